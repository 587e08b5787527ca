"data.files: every parser on files in the true format, on hostile ones and on random bytes; downloads from a local server; the real sets where they are found."
import contextlib, errno, gzip, hashlib, http.server, io, os, struct, subprocess, sys, tarfile, threading, zipfile
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from disdiff_tutorial import core
from disdiff_tutorial.data import files
from disdiff_tutorial.data.files import File, Source, Unavailable, read_idx
from disdiff_tutorial.data.sprites import Sprites

SHARED = Path(os.environ.get("DISDIFF_SHARED") or Path(__file__).parents[2] / "shared") / "data"
MNIST = next((p for p in (SHARED / "mnist", core.data_dir() / "mnist") if all(files.find(f, p) for f in files.SOURCES["mnist"].files)), None)
FASHION = next((p for p in (core.data_dir() / "fashion_mnist", Path("/usr/share/datasets/fashion-mnist")) if all(files.find(f, p) for f in files.SOURCES["fashion_mnist"].files)), None)
real = pytest.mark.skipif(MNIST is None, reason="the four MNIST files are not on this machine")
COUNTS = {"train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]}


def idx(values, kind=8):
    return bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def one_line(error, *words):
    text = str(error.value if hasattr(error, "value") else error)
    assert text and "\n" not in text and "\r" not in text, text
    for word in words: assert word in text, text


# --- the real MNIST -----------------------------------------------------------------------------------------------------

@real
@pytest.mark.parametrize("split, n, first", [("train", 60_000, [5, 0, 4, 1, 9]), ("test", 10_000, [7, 2, 1, 0, 4])])
def test_real_mnist(split, n, first):
    s = files.load("mnist", root=MNIST, split=split)
    assert s.name == "mnist" and s.images.shape == (n, 1, 28, 28) and s.images.dtype == torch.uint8
    assert s.labels.shape == (n,) and s.labels.dtype == torch.int64
    assert s.labels[:5].tolist() == first and s.labels.bincount().tolist() == COUNTS[split]
    assert s.images.amin() == 0 and s.images.amax() == 255
    if split == "train": assert abs(s.images.float().mean() / 255 - 0.1307) < 5e-5  # the constant in everybody's Normalize((0.1307,), ...)


@real
def test_real_mnist_agrees_with_an_independent_reader():
    path = files.find("t10k-images-idx3-ubyte", MNIST)
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    assert np.array_equal(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28), read_idx(path).numpy())


@pytest.mark.parametrize("name, here, counts", [("mnist", MNIST, COUNTS["test"]), ("fashion_mnist", FASHION, [1000] * 10)], ids=["mnist", "fashion_mnist"])
def test_real_files_from_a_mirror_through_the_command(tmp_path, name, here, counts):
    "The true files through the true code, in a process of its own: only the address of the mirror differs."
    if not here or not all((here / f"{f}.gz").is_file() for f in files.SOURCES[name].files): pytest.skip("the four files are not on this machine, or not gzipped")
    env = os.environ | {"DISDIFF_DATA": str(tmp_path), f"DISDIFF_{name.upper()}_MIRROR": here.resolve().as_uri()}
    done = subprocess.run([sys.executable, "-c", "from disdiff_tutorial.run import main; main()", "data", "get", name], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and [Path(line).name for line in done.stdout.splitlines()] == [f"{f}.gz" for f in files.SOURCES[name].files], done.stderr
    assert files.load(name, tmp_path / name, "test").labels.bincount().tolist() == counts


@real
def test_one_changed_byte_in_real_mnist_is_found(tmp_path):
    raw = bytearray(files.content(files.find("t10k-labels-idx1-ubyte", MNIST), files.SOURCES["mnist"].files["t10k-labels-idx1-ubyte"]))
    raw[1234] ^= 1
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(raw)
    (tmp_path / "t10k-images-idx3-ubyte.gz").symlink_to(files.find("t10k-images-idx3-ubyte", MNIST).resolve())
    with pytest.raises(ValueError) as e: files.load("mnist", tmp_path, "test")
    one_line(e, "t10k-labels-idx1-ubyte", "ff7bcfd416de", "delete it and load again")


# --- the parser ---------------------------------------------------------------------------------------------------------

SMALL = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("kind, dtype", [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_all_types(tmp_path, kind, dtype, pack):
    values = (SMALL.astype(float) - 7).astype(dtype) if dtype != "u1" else SMALL
    (tmp_path / "x").write_bytes(pack(idx(values.astype(">" + dtype), kind)))
    got = read_idx(tmp_path / "x", shape=(2, 3, 4))
    assert got.dtype == torch.from_numpy(values).dtype and torch.equal(got, torch.from_numpy(values))
    got += 1  # writable memory of its own


good, packed = idx(SMALL), gzip.compress(idx(SMALL))
BAD = {
    "empty": b"", "three bytes": good[:3], "not idx": b"PK\x03\x04" + good, "bad zeros": b"\x01" + good[1:], "bad type": good[:2] + b"\x0a" + good[3:],
    "no dims": good[:3] + b"\0" + good[4:], "9 dims": good[:3] + b"\x09" + b"\0\0\0\1" * 9 + b"a", "255 dims": good[:3] + b"\xff" + good[4:],
    "cut sizes": good[:10], "zero size": good[:4] + bytes(4) + good[8:], "larger dims": good[:7] + b"\3" + good[8:], "smaller dims": good[:7] + b"\1" + good[8:],
    "huge dims": good[:4] + b"\xff" * 12 + good[16:], "no values": good[:4] + bytes(12), "none by huge": good[:4] + bytes(4) + b"\xff" * 8, "little-endian": good[:4] + struct.pack("<3I", 2, 3, 4) + good[16:],
    "cut values": good[:-1], "header only": good[:16], "trailing": good + b"\0", "trailing newline": good + b"\n",
    "gz: cut": packed[:-1], "gz: cut early": packed[:12], "gz: magic only": packed[:2], "gz: crc": packed[:-5] + bytes([packed[-5] ^ 1]) + packed[-4:],
    "gz: junk behind": packed + b"junk", "gz: of nothing": gzip.compress(b""), "gz: of text": gzip.compress(b"hello"), "gz: trailing": gzip.compress(good + b"!"),
    "gz: two members": packed + packed, "gz: in gz": gzip.compress(packed)}


@pytest.mark.parametrize("name", BAD)
def test_malformed(tmp_path, name):
    path = tmp_path / "digits-idx3-ubyte"
    path.write_bytes(BAD[name])
    with pytest.raises(ValueError) as e: read_idx(path)
    one_line(e, "expected ", "found ", "digits-idx3-ubyte", "again")


def test_wrong_shape_and_missing_file(tmp_path):
    (tmp_path / "x").write_bytes(good)
    with pytest.raises(ValueError) as e: read_idx(tmp_path / "x", shape=(2, 4, 3))
    one_line(e, "expected shape (2, 4, 3)", "found (2, 3, 4)")
    for path in (tmp_path / "y", tmp_path):
        with pytest.raises(FileNotFoundError) as e: read_idx(path)
        one_line(e, "expected a file", path.name)


def test_gzip_bomb_is_not_unpacked(tmp_path):
    import tracemalloc
    (tmp_path / "bomb").write_bytes(gzip.compress(idx(np.zeros(1, np.uint8)) + bytes(1 << 26), compresslevel=1))
    tracemalloc.start()
    with pytest.raises(ValueError) as e: read_idx(tmp_path / "bomb")
    with pytest.raises(ValueError) as f: files.content(tmp_path / "bomb", File(100, 9, "0" * 64))
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    one_line(e, "found more"); one_line(f, "expected 9 bytes", "found more")
    assert peak < 4e6  # of 67 MB


def test_a_promise_of_a_gibibyte_costs_no_memory(tmp_path):
    import tracemalloc
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", files.LIMIT) + b"abc")
    tracemalloc.start()
    with pytest.raises(ValueError) as e: read_idx(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 4e6; tracemalloc.stop()
    one_line(e, "1,073,741,824 bytes", "found 3")
    (tmp_path / "x").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", files.LIMIT + 1) + b"abc")
    with pytest.raises(ValueError) as e: read_idx(tmp_path / "x")
    one_line(e, "expected 1 to 1,073,741,824 bytes", "1,073,741,825")  # said before anything is read


def parses_or_says_why(path, raw):
    path.write_bytes(raw)
    try: got = read_idx(path)
    except ValueError as err: return one_line(err, "expected ", "found ", path.name)
    plain = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    shape = struct.unpack(f">{plain[3]}I", plain[4:4 + 4 * plain[3]])
    assert tuple(got.shape) == shape and got.numel() * got.element_size() + 4 + 4 * plain[3] == len(plain)


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
headers = st.builds(lambda kind, dims, tail: bytes([0, 0, kind, len(dims)]) + struct.pack(f">{len(dims)}I", *dims) + tail,
                    st.integers(7, 15), st.lists(st.integers(0, 4) | st.integers(0, 2**32 - 1), max_size=9), st.binary(max_size=64))
edits = st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4)


@fuzz
@given(raw=st.binary(max_size=80) | headers | st.binary(max_size=60).map(lambda b: b"\x1f\x8b\x08" + b) | headers.map(gzip.compress))
def test_fuzz_bytes(tmp_path, raw):
    parses_or_says_why(tmp_path / "fuzz", raw)


@fuzz
@given(start=st.sampled_from([good, packed]), edits=edits)
def test_fuzz_edits_of_a_good_file(tmp_path, start, edits):
    raw = bytearray(start)
    for at, new, cut in edits: at %= len(raw) + 1; raw[at:at + cut] = new  # replace, insert, delete
    parses_or_says_why(tmp_path / "fuzz", bytes(raw))


# --- downloads, from a server on this machine ---------------------------------------------------------------------------

IMAGES, LABELS = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8), (np.arange(40) % 10).astype(np.uint8)
CONTENTS = {"train-images-idx3-ubyte": idx(IMAGES), "train-labels-idx1-ubyte": idx(LABELS), "t10k-images-idx3-ubyte": idx(IMAGES[:9]), "t10k-labels-idx1-ubyte": idx(LABELS[:9])}
PACKED = {f"{name}.gz": gzip.compress(c) for name, c in CONTENTS.items()}


PAIRS = ("mnist", "fashion_mnist")
both = pytest.mark.parametrize("name", PAIRS)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `replies[file]`: the bytes, the length announced (None: not announced), the status; notes what was asked. `server.ranges` says whether it sends parts;
    `server.cut[file]` is a list: after how many bytes to hang up, once for each entry."""
    def do_GET(self):
        name, start = self.path.rsplit("/", 1)[-1], int((self.headers["Range"] or "bytes=0-")[6:-1])
        self.server.asked.append(self.path if not start else (self.path, start))
        body, length, status = self.server.replies.get(name, (b"gone", 4, 404))
        if start and self.server.ranges and status == 200:
            if start >= len(body): status, body, length = 416, b"", 0
            else: status, body, length = 206, body[start:], length and length - start
        self.send_response(status)
        if status == 206: self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/*")
        if status == 302: self.send_header("Location", self.path)
        if length is not None: self.send_header("Content-Length", str(length))
        self.end_headers(); self.wfile.write(body[:cut.pop(0)] if (cut := self.server.cut.get(name)) else body)
    def log_message(self, *words): pass


@pytest.fixture
def mirror(monkeypatch):
    "A mirror that behaves; a test bends `replies`. The data sets `mnist` and `fashion_mnist` are small ones meanwhile, with the same files."
    monkeypatch.setenv("no_proxy", "127.0.0.1"); monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.asked, server.ranges, server.cut, server.replies = [], True, {}, {name: (body, len(body), 200) for name, body in PACKED.items()}
        server.url = f"http://127.0.0.1:{server.server_port}/some/folder"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}); thread.start()
        table = {name: File(len(PACKED[f"{name}.gz"]), len(c), hashlib.sha256(c).hexdigest()) for name, c in CONTENTS.items()}
        for name in PAIRS:
            monkeypatch.setitem(files.SOURCES, name, files.SOURCES[name]._replace(files=table, mirrors=("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")))
            monkeypatch.setenv(f"DISDIFF_{name.upper()}_MIRROR", server.url)
        yield server
        server.shutdown(); thread.join()


@both
def test_download(tmp_path, mirror, capfd, monkeypatch, name):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)          # somebody watches
    s = files.load(name, tmp_path / "new" / name)
    assert s.name == name and np.array_equal(s.images[:, 0].numpy(), IMAGES) and s.labels.tolist() == LABELS.tolist()
    bar = capfd.readouterr().out
    assert "train-images-idx3-ubyte.gz: 100%" in bar and "train-labels-idx1-ubyte.gz: 100%" in bar
    assert sorted(p.name for p in (tmp_path / "new" / name).iterdir()) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert (tmp_path / "new" / name / "train-labels-idx1-ubyte.gz").read_bytes() == PACKED["train-labels-idx1-ubyte.gz"]
    files.load(name, tmp_path / "new" / name)
    assert len(mirror.asked) == 2 and capfd.readouterr().out == ""  # the second time nobody is asked


@both
def test_get_fetches_what_is_missing_and_checks_all(tmp_path, mirror, name):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(CONTENTS["train-images-idx3-ubyte"])
    paths = files.get(name, str(tmp_path))
    assert [p.name for p in paths] == ["train-images-idx3-ubyte"] + [f"{n}.gz" for n in list(CONTENTS)[1:]] and len(mirror.asked) == 3
    paths[3].write_bytes(b"?")
    with pytest.raises(ValueError) as e: files.get(name, tmp_path)
    one_line(e, "t10k-labels-idx1-ubyte.gz", "delete it and load again")
    assert paths[3].read_bytes() == b"?" and len(mirror.asked) == 3


@both
def test_default_folder_and_table(tmp_path, mirror, monkeypatch, name):
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    row = lambda: {r.name: r for r in files.table()}[name]
    assert row()[:2] == (name, 70_000) and not row().present and row().licence and row().address.startswith("http")
    files.get(name)
    assert row().present and (tmp_path / name / "t10k-labels-idx1-ubyte.gz").is_file()
    assert files.load(name).images.shape == (40, 1, 28, 28)


@both
def test_get_through_the_command(tmp_path, mirror, monkeypatch, capfd, name):
    "`disdiff data get NAME` prints one path a line and leaves just these files; the second time it asks nobody, and `disdiff data list` says that they are here."
    from disdiff_tutorial import run
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    for _ in range(2):
        run.main(["data", "get", name])
        assert [Path(line).name for line in capfd.readouterr().out.splitlines()] == list(PACKED) and len(mirror.asked) == 4
    assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == PACKED
    run.main(["data", "list"])
    assert [" not here " in line for line in capfd.readouterr().out.splitlines() if line.split()[0] == name] == [False]


def test_table_of_the_true_set():
    rows = {r.name: r for r in files.table()}
    assert round(rows["mnist"].megabytes, 1) == 11.6 and rows["mpi3d_toy"].megabytes is None


def test_length_not_announced(tmp_path, mirror):
    mirror.replies = {name: (body, None, 200) for name, body in PACKED.items()}
    assert len(files.load("mnist", tmp_path).labels) == 40


@both
def test_next_mirror_is_tried(tmp_path, mirror, monkeypatch, name):
    monkeypatch.delenv(f"DISDIFF_{name.upper()}_MIRROR")
    monkeypatch.setitem(files.SOURCES, name, files.SOURCES[name]._replace(mirrors=("http://127.0.0.1:9", "nonsense", mirror.url + "/")))
    assert len(files.load(name, tmp_path).labels) == 40
    assert mirror.asked == ["/some/folder/train-images-idx3-ubyte.gz", "/some/folder/train-labels-idx1-ubyte.gz"]


NAME = "train-images-idx3-ubyte.gz"
body, other = PACKED[NAME], bytearray(CONTENTS["train-images-idx3-ubyte"]); other[500] ^= 1
REPLIES = {  # name: (body, announced length, status), words of the message
    "redirects for ever": ((b"", 0, 302), "infinite loop"),
    "killed mid-stream": ((body[:5000], len(body), 200), "broke off after 5,000 of"),
    "killed, no length": ((body[:5000], None, 200), "damaged"), "killed at once": ((b"", len(body), 200), "broke off after 0"),
    "empty": ((b"", 0, 200), "damaged"), "404": ((b"gone", 4, 404), "404"), "500": ((b"", 0, 500), "500"), "bad length": ((body, "many", 200), "many"),
    "tampered": ((gzip.compress(bytes(other)), len(gzip.compress(bytes(other))), 200), "not the original"),
    "flipped byte": ((body[:900] + bytes([body[900] ^ 1]) + body[901:], len(body), 200), "damaged"),
    "truncated gz": ((body[:-20], len(body) - 20, 200), "damaged"), "a web page": ((b"<html>log in</html>", 19, 200), "damaged"),
    "another file": ((PACKED["t10k-images-idx3-ubyte.gz"], None, 200), "not the original"),
    "bomb": ((gzip.compress(CONTENTS["train-images-idx3-ubyte"] + bytes(1 << 23)), None, 200), "damaged"),
    "too large": ((bytes(10 * len(body)), None, 200), "not the original")}


@both
@pytest.mark.parametrize("case", REPLIES)
def test_mirror_misbehaves(tmp_path, mirror, case, name):
    mirror.replies[NAME], words = REPLIES[case]
    with pytest.raises(Unavailable) as e: files.load(name, tmp_path)
    one_line(e, words, mirror.url, NAME, "by hand", f"DISDIFF_{name.upper()}_MIRROR")
    kept = [p.name for p in tmp_path.iterdir()]
    assert kept == ([NAME + ".part"] if case == "killed mid-stream" else [])  # kept to go on with; of all the rest nothing


def test_limit_holds_without_a_progress_bar(tmp_path, mirror):
    mirror.replies[NAME] = REPLIES["too large"][0]
    with pytest.raises(Unavailable, match="not the original"): files.load("mnist", tmp_path)


@pytest.mark.parametrize("answer", [b"220 this is no web server\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"])
def test_mirror_that_is_no_web_server_or_breaks_off_in_a_chunk(mirror, answer):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as odd:
        def reply():
            with odd.accept()[0] as call: call.recv(1000); call.sendall(answer)
        thread = threading.Thread(target=reply); thread.start()
        with pytest.raises(files.Failed) as e: list(files.stream(f"http://127.0.0.1:{odd.getsockname()[1]}/x"))
        thread.join()
    one_line(e)


def test_mirror_that_hangs(mirror):
    "A server that takes the call and never answers costs the timeout, not the afternoon."
    import socket
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(files.Failed) as e: list(files.stream(f"http://127.0.0.1:{silent.getsockname()[1]}/x", timeout=0.2))
    one_line(e, "timed out")


@both
def test_no_network(tmp_path, mirror, monkeypatch, name):
    monkeypatch.delenv(f"DISDIFF_{name.upper()}_MIRROR")
    with pytest.raises(Unavailable) as e: files.load(name, tmp_path)
    one_line(e, "127.0.0.1:9/a (", "127.0.0.1:9/b (", "refused", NAME)
    with pytest.raises(Unavailable): files.get(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Unavailable): files.get(name, tmp_path / name)
    assert list(tmp_path.iterdir()) == []                                    # nor an empty folder


def test_fallback(tmp_path, mirror, monkeypatch, capfd):
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    assert files.mnist_or_digits("test").name == "mnist"
    monkeypatch.setenv("DISDIFF_MNIST_MIRROR", "http://127.0.0.1:9"); capfd.readouterr()
    s = files.mnist_or_digits()
    said = capfd.readouterr().out
    assert s.name == "digits" and said.count("\n") == 1 and "MNIST" in said and "digits" in said
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"?")
    with pytest.raises(ValueError): files.mnist_or_digits("test")  # a damaged file is not a missing one


def test_disk_full_while_writing(tmp_path, mirror):
    "The part leads to /dev/full: the system's own error, at the write."
    if not Path("/dev/full").exists(): pytest.skip("no /dev/full on this system")
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path)
    one_line(e, NAME, "No space left on device", "free space")
    assert not isinstance(e.value, Unavailable) and e.value.__cause__.errno == errno.ENOSPC
    assert not (tmp_path / NAME).exists() and len(mirror.asked) == 1  # another mirror would not help


def test_disk_full_at_the_rename(tmp_path, mirror, monkeypatch):
    def replace(*paths): raise OSError(28, "No space left on device")
    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path)
    one_line(e, NAME, "No space left on device"); assert not isinstance(e.value, Unavailable)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [NAME + ".part"]


def test_folder_that_cannot_be_written(tmp_path, mirror, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path / "file" / "mnist")
    one_line(e, "choose a writable folder"); assert not isinstance(e.value, Unavailable)


def test_interrupt_leaves_a_part_and_the_next_call_goes_on(tmp_path, mirror, monkeypatch):
    whole = files.stream
    def stream(*args):
        yield 0, PACKED[NAME][:3000]
        raise KeyboardInterrupt
    monkeypatch.setattr(files, "stream", stream)
    with pytest.raises(KeyboardInterrupt): files.load("mnist", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [NAME + ".part"]
    monkeypatch.setattr(files, "stream", whole)
    assert len(files.load("mnist", tmp_path).images) == 40 and mirror.asked[0] == (f"/some/folder/{NAME}", 3000)


def test_a_download_cut_three_times(tmp_path, mirror):
    "Each call goes on where the last was cut; the file gets its name in the end, and is the file."
    mirror.cut[NAME] = [4000, 5000, 1]
    for have in (4000, 9000, 9001):
        with pytest.raises(Unavailable, match=f"broke off after {have:,}"): files.load("mnist", tmp_path)
        assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {NAME + ".part": have}
    files.load("mnist", tmp_path)
    assert (tmp_path / NAME).read_bytes() == PACKED[NAME] and not list(tmp_path.glob("*.part"))
    assert [a for a in mirror.asked if NAME in str(a)] == [f"/some/folder/{NAME}"] + [(f"/some/folder/{NAME}", k) for k in (4000, 9000, 9001)]


def test_a_server_that_cannot_send_parts_sends_all_again(tmp_path, mirror):
    mirror.ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(PACKED[NAME][:4000])
    assert len(files.load("mnist", tmp_path).images) == 40
    assert (tmp_path / NAME).read_bytes() == PACKED[NAME] and mirror.asked[0] == (f"/some/folder/{NAME}", 4000)


@pytest.mark.parametrize("part", [b"x" * 4000, PACKED["t10k-images-idx3-ubyte.gz"], bytes(10**5)], ids=["junk", "another file", "too long: 416"])
def test_a_part_that_does_not_fit_is_started_over(tmp_path, mirror, part):
    (tmp_path / f"{NAME}.part").write_bytes(part)
    assert len(files.load("mnist", tmp_path).images) == 40
    assert (tmp_path / NAME).read_bytes() == PACKED[NAME] and len([a for a in mirror.asked if NAME in str(a)]) == 2


def test_a_whole_part_is_only_checked(tmp_path, mirror, monkeypatch):
    "A set whose files travel as they are: nothing is asked of the server when all has come already."
    monkeypatch.setitem(files.SOURCES, "ten", Source({"all": 1}, "", "", (mirror.url,), {"a.bin": File(None, 7, hashlib.sha256(b"seven!!").hexdigest())}, None))
    (tmp_path / "a.bin.part").write_bytes(b"seven!!")
    assert [p.read_bytes() for p in files.get("ten", tmp_path)] == [b"seven!!"] and mirror.asked == [] and len(list(tmp_path.iterdir())) == 1


def test_a_server_that_answers_with_another_part(tmp_path, mirror, monkeypatch):
    (tmp_path / f"{NAME}.part").write_bytes(PACKED[NAME][:4000])
    monkeypatch.setattr(Mirror, "send_header", lambda self, k, v: http.server.BaseHTTPRequestHandler.send_header(self, k, "bytes 7-9/10" if k == "Content-Range" else v))
    with pytest.raises(Unavailable) as e: files.load("mnist", tmp_path)
    one_line(e, "asked for byte 4,000, got 7")


@pytest.mark.parametrize("file", [File(None, 7, None, hashlib.md5(b"seven!!").hexdigest()), File(None, None, None, hashlib.md5(b"seven!!").hexdigest())])
def test_only_an_md5_is_known(tmp_path, mirror, monkeypatch, file):
    monkeypatch.setitem(files.SOURCES, "ten", Source({"all": 1}, "", "", (mirror.url,), {"a.bin": file}, None))
    for body, good in ((b"seven!?", False), (b"seven!!", True)):
        mirror.replies["a.bin"] = body, 7, 200
        if good: assert files.get("ten", tmp_path)[0].read_bytes() == body
        else:
            with pytest.raises(Unavailable, match="not the original"): files.get("ten", tmp_path)
            assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path, mirror):
    done = []
    threads = [threading.Thread(target=lambda: done.append(files.load("mnist", tmp_path).images.sum().item())) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert done == [int(IMAGES.sum(dtype=np.int64))] * 4 and len(list(tmp_path.iterdir())) == 2


def test_many_claim_one_name(tmp_path):
    "Each takes the file and gives its name up again at once, so that the name goes while others wait for it."
    inside, most, part = [], [], tmp_path / "a.part"
    def claim():
        for _ in range(300):
            with files.claimed(part) as f: inside.append(1); most.append(len(inside)); f.truncate(0); inside.pop()
    threads = [threading.Thread(target=claim, daemon=True) for _ in range(8)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(most) == 8 * 300 and max(most) == 1 and not part.exists()


# --- arguments, and the small digits ------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [lambda: files.load([]), lambda: files.load("minst"), lambda: files.get("minst"), lambda: files.load("")])
def test_unknown_set(call):
    with pytest.raises(ValueError) as e: call()
    one_line(e, "expected a data set among dsprites", "mnist")


@pytest.mark.parametrize("call", [lambda: files.load("mnist", split=[]), lambda: files.load("mnist", split="valid"), lambda: files.digits("valid"), lambda: files.mnist_or_digits("")])
def test_unknown_split(call):
    with pytest.raises(ValueError) as e: call()
    one_line(e, "expected split 'train' or 'test'")


def test_digits():
    train, test = files.digits(), files.digits("test")
    assert train.images.shape == (1500, 1, 28, 28) and test.images.shape == (297, 1, 28, 28) and train.name == "digits"
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64 and train.images.amax() == 255
    border = train.images.clone(); border[:, :, 4:24, 4:24] = 0
    assert border.sum() == 0
    both = torch.cat([train.labels, test.labels]).bincount()
    from sklearn.datasets import load_digits
    assert both.tolist() == np.bincount(load_digits().target).tolist() and test.labels.bincount().min() > 15
    assert torch.equal(files.digits().images, train.images) and train.labels[:10].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5]  # the same for ever


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(files.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as e: files.digits()
    one_line(e, "pip install scikit-learn")


# --- factor sets: files in the true format, small; then hostile ones ------------------------------------------------------

def shrink(monkeypatch, name, **new): monkeypatch.setitem(files.SOURCES, name, files.SOURCES[name]._replace(**new))
def unsized(name): return {f: File(None, None, None) for f in files.SOURCES[name].files}
def npy(array, pickled=False): f = io.BytesIO(); np.lib.format.write_array(f, array, allow_pickle=pickled); return f.getvalue()
def header(text): return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"

def zipped(path, members, how=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", how) as z:
        for name, body in members.items(): z.writestr(name, body)
    return path


class Payload:
    "Pickled, it makes a folder `ran` when somebody unpickles it."
    def __init__(self, where): self.where = where
    def __reduce__(self): return os.mkdir, (str(self.where / "ran"),)


SOME = {"color": slice(None), "shape": slice(None), "scale": slice(None), "orientation": slice(0, 40, 8), "posX": slice(0, 32, 31), "posY": slice(0, 32, 31)}
TABLES = {k: v[SOME[k]] for k, v in files.SOURCES["dsprites"].tables.items()}
NUMBER = torch.cartesian_prod(*(torch.arange(len(v)) for v in TABLES.values()))
SPRITES = Sprites(device="cpu").images(NUMBER * torch.tensor([1, 1, 1, 8, 31, 31]))
VALUES = torch.stack([v[i] for v, i in zip(TABLES.values(), NUMBER.T)], 1).numpy()


@pytest.fixture
def dsprites(tmp_path, monkeypatch):
    "Writes a small dSprites file: `write(**changes)`; arrays as in the true file, headers as Python 2 wrote them, metadata a pickle."
    shrink(monkeypatch, "dsprites", tables=TABLES, splits={"all": 360}, files=unsized("dsprites"))
    def write(**changes):
        arrays = {"imgs": (SPRITES[:, 0] > 0).numpy().astype("u1"), "latents_classes": NUMBER.numpy(), "latents_values": VALUES} | changes
        members = {f"{k}.npy": v if isinstance(v, bytes) else npy(v, v.dtype == object) for k, v in arrays.items() if v is not None}
        imgs = members.get("imgs.npy", b"")
        if "imgs" not in changes: members["imgs.npy"] = header("{'descr': '|u1', 'fortran_order': False, 'shape': (360L, 64L, 64L), }") + imgs[-360 * 4096:]
        described = {b"title": b"dSprites dataset", b"latents_sizes": np.array([1, 3, 6, 5, 2, 2]), b"run": Payload(tmp_path)}
        zipped(tmp_path / next(iter(files.SOURCES["dsprites"].files)), {"metadata.npy": npy(np.array(described, dtype=object), True)} | members)
        return files.load("dsprites", tmp_path)
    return write


def test_dsprites(dsprites, tmp_path):
    s = dsprites()
    assert len(s) == 360 and s.shape == (1, 64, 64) and s.grid.names == tuple(TABLES) and torch.equal(s.stored[:], SPRITES)
    f = s.grid.sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(s.images(f).cpu(), SPRITES[s.grid.index(f)]) and np.allclose(s.values(f), VALUES[s.grid.index(f)])
    assert not (tmp_path / "ran").exists() and len(list(tmp_path.iterdir())) == 1


bad_values, bad_classes = VALUES.copy(), NUMBER.numpy().copy()
bad_values[7, 3], bad_classes[[0, 1]] = np.nan, bad_classes[[1, 0]]
IMGS = (SPRITES[:, 0] > 0).numpy().astype("u1")
BAD_SPRITES = {
    "NaN": (dict(latents_values=bad_values), ["row 7 of latents_values", "found nan"]), "order": (dict(latents_classes=bad_classes), ["row 0 of latents_classes"]),
    "no images": (dict(imgs=npy(IMGS[:0])), ["imgs.npy", "(0, 64, 64)"]), "shape": (dict(imgs=IMGS.reshape(360, 32, 128)), ["shape (360, 64, 64)", "(360, 32, 128)"]),
    "type": (dict(imgs=IMGS.astype("f4")), ["uint8", "float32"]), "grey": (dict(imgs=IMGS * 2), ["pixels 0 and 1"]), "missing": (dict(imgs=None), ["'imgs'"]),
    "Fortran": (dict(imgs=header("{'descr': '|u1', 'fortran_order': True, 'shape': (360, 64, 64), }") + IMGS.tobytes()), ["Fortran"]),
    "short": (dict(imgs=npy(IMGS)[:-1]), ["bytes of imgs"]), "long": (dict(imgs=npy(IMGS) + b"!"), ["bytes of imgs"]), "no npy": (dict(imgs=b"hello"), ["plain npy array"]),
    "deep header": (dict(imgs=header("(" * 9000)), ["plain npy array"]), "long header": (dict(imgs=header(" " * 60_000)), ["plain npy array"]),
    "code in header": (dict(imgs=header("__import__('os').mkdir('ran')")), ["plain npy array"]), "promise": (dict(imgs=header("{'descr': '|u1', 'fortran_order': False, 'shape': (360, 99999999, 64), }")), ["bytes of imgs"])}


@pytest.mark.parametrize("case", BAD_SPRITES)
def test_bad_dsprites(dsprites, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, words = BAD_SPRITES[case]
    with pytest.raises(ValueError) as e: dsprites(**changes)
    one_line(e, "expected ", "found ", "dsprites_ndarray", *words)
    assert not (tmp_path / "ran").exists() and len(list(tmp_path.iterdir())) == 1


def test_pickles_are_never_run(dsprites, tmp_path):
    "A payload in place of each array that we do read."
    for name in ("imgs", "latents_values", "latents_classes"):
        with pytest.raises(ValueError) as e: dsprites(**{name: np.array(Payload(tmp_path), dtype=object)})
        one_line(e, "do not unpickle it", "dsprites_ndarray")
    assert not (tmp_path / "ran").exists()
    np.load(io.BytesIO(npy(np.array(Payload(tmp_path), dtype=object), True)), allow_pickle=True)
    assert (tmp_path / "ran").exists()  # the payload is live: numpy would have run it


def test_dsprites_against_its_checksum(dsprites, monkeypatch, tmp_path):
    name = next(iter(files.SOURCES["dsprites"].files))
    dsprites()
    right = File(None, None, None, hashlib.md5((tmp_path / name).read_bytes()).hexdigest())
    shrink(monkeypatch, "dsprites", files={name: right}); files.load("dsprites", tmp_path)
    shrink(monkeypatch, "dsprites", files={name: right._replace(md5="0" * 32)})
    with pytest.raises(ValueError) as e: files.load("dsprites", tmp_path)
    one_line(e, "md5 000000000000...", name)


def test_factors_are_the_published_ones():
    names = {"cars3d": "elevation azimuth object_type", "mpi3d_toy": "object_color object_shape object_size camera_height background_color horizontal_axis vertical_axis",
             "shapes3d": "floor_hue wall_hue object_hue scale shape orientation", "dsprites": "color shape scale orientation posX posY"}
    for name, expected in names.items(): assert " ".join(files.SOURCES[name].tables) == expected
    assert [len(v) for v in files.SOURCES["cars3d"].tables.values()] == [4, 24, 183] and [len(v) for v in files.SOURCES["mpi3d_toy"].tables.values()] == [6, 6, 2, 3, 3, 40, 40]


def test_grids_are_the_published_ones():
    weights = {"dsprites": (737280, 245760, 40960, 1024, 32, 1), "shapes3d": (48000, 4800, 480, 60, 15, 1), "cars3d": (4392, 183, 1), "mpi3d_toy": (172800, 28800, 14400, 4800, 1600, 40, 1)}
    for name, expected in weights.items():
        s = files.SOURCES[name]
        grid = files.FactorGrid(s.tables, (len(v) for v in s.tables.values()))
        every = torch.arange(len(grid))
        assert grid.weights == expected and len(grid) == s.splits["all"] and torch.equal(grid.index(grid.factors(every)), every)
    t = files.SOURCES["shapes3d"].tables
    assert t["wall_hue"][3] == pytest.approx(.3) and t["scale"].tolist()[1] == pytest.approx(.75 + .5 / 7) and t["orientation"].tolist()[::14] == [-30, 30]


# --- HDF5 ---

h5py = pytest.importorskip("h5py", reason="h5py, of the extra `files`, is not installed")
SMALL3D = {"hue": torch.arange(3.).double() / 10, "size": torch.tensor([.75, 1.25]).double()}
HUES = np.stack(np.meshgrid(*SMALL3D.values(), indexing="ij"), -1).reshape(-1, 2)
COLOURED = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def shapes3d(tmp_path, monkeypatch):
    shrink(monkeypatch, "shapes3d", tables=SMALL3D, splits={"all": 6}, files=unsized("shapes3d"))
    def write(images=COLOURED, labels=HUES, **kw):
        with h5py.File(tmp_path / "3dshapes.h5", "w") as f:
            f.create_dataset("images", data=images, **kw); f.create_dataset("labels", data=labels)
        return files.load("shapes3d", tmp_path)
    return write


@pytest.mark.parametrize("kw", [{}, {"compression": "gzip", "chunks": (4, 64, 64, 3)}])
def test_shapes3d(shapes3d, kw):
    s = shapes3d(**kw)
    truth = torch.from_numpy(COLOURED).permute(0, 3, 1, 2)
    assert torch.equal(s.stored[:], truth) and torch.equal(s.stored[torch.tensor([5, 0, 5, 2])], truth[[5, 0, 5, 2]]) and s.stored[[]].shape == (0, 3, 64, 64)
    assert torch.equal(s.images(torch.tensor([[2, 1], [0, 1]])).cpu(), truth[[5, 1]])


nan, swapped = HUES.copy(), HUES.copy()
nan[4, 0], swapped[[1, 2]] = np.nan, swapped[[2, 1]]


@pytest.mark.parametrize("change, words", [
    (dict(labels=nan), ["hue 0.2 in row 4 of labels", "found nan"]), (dict(labels=swapped), ["row 1 of labels"]), (dict(labels=HUES.astype("f4")), ["float32"]), (dict(labels=HUES[:5]), ["(5, 2)"]),
    (dict(images=COLOURED[:, :32]), ["(6, 32, 64, 3)"]), (dict(images=COLOURED.astype("f4")), ["float32"]), (dict(images=COLOURED[:0]), ["(0, 64, 64, 3)"])])
def test_bad_shapes3d(shapes3d, change, words):
    with pytest.raises(ValueError) as e: shapes3d(**change)
    one_line(e, "3dshapes.h5", *words)


def test_hdf5_that_points_elsewhere(shapes3d, tmp_path):
    "Links and storage outside of the file are refused, whatever they lead to."
    (tmp_path / "secret").write_bytes(bytes(COLOURED.nbytes))
    with h5py.File(tmp_path / "other.h5", "w") as f: f["images"] = COLOURED
    layout = h5py.VirtualLayout(COLOURED.shape, "u1"); layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "images", COLOURED.shape)
    for point in (lambda f: f.__setitem__("images", h5py.ExternalLink(str(tmp_path / "other.h5"), "images")), lambda f: f.__setitem__("images", h5py.SoftLink("/labels")),
                  lambda f: f.__setitem__("images", h5py.SoftLink("/nowhere")), lambda f: f.create_group("images"), lambda f: f.create_virtual_dataset("images", layout),
                  lambda f: f.create_dataset("images", COLOURED.shape, "u1", external=[(str(tmp_path / "secret"), 0, COLOURED.nbytes)])):
        with h5py.File(tmp_path / "3dshapes.h5", "w") as f: point(f); f["labels"] = HUES
        with pytest.raises(ValueError) as e: files.load("shapes3d", tmp_path)
        one_line(e, "a plain array 'images' in", "3dshapes.h5")


def test_large_chunks_are_refused(shapes3d, tmp_path):
    shapes3d(chunks=(6, 64, 64, 3))
    with pytest.raises(ValueError) as e: files.h5_array(tmp_path / "3dshapes.h5", "images", "u1", COLOURED.shape, most=70_000)
    one_line(e, "chunks of at most 70,000 bytes", "73,728")


def test_damaged_hdf5(shapes3d, tmp_path):
    shapes3d(compression="gzip", chunks=(1, 64, 64, 3))
    path, raw = tmp_path / "3dshapes.h5", (tmp_path / "3dshapes.h5").read_bytes()
    for bad in (b"", b"\x89HDF\r\n\x1a\n", raw[:3000], raw[:-1000], b"<html>" + raw):
        path.write_bytes(bad)
        with pytest.raises(ValueError) as e: files.load("shapes3d", tmp_path)
        one_line(e, "3dshapes.h5 to be an HDF5 file")
    at = raw.index(b"\x78\x5e") if b"\x78\x5e" in raw else raw.index(b"\x78\x9c")  # the first compressed chunk
    path.write_bytes(raw[:at + 2] + bytes(500) + raw[at + 502:])
    s = files.load("shapes3d", tmp_path)
    with pytest.raises(ValueError) as e: s.stored[:]
    one_line(e, "3dshapes.h5")


def test_badly_cut_hdf5_is_said_and_unpacked(shapes3d, tmp_path, monkeypatch, capsys):
    "When one image costs megabytes of unpacking, `load` says so; `unpack` writes a plain file that `load` prefers."
    monkeypatch.setattr(files, "h5_cost", lambda array: 5 << 20)
    s = shapes3d(compression="gzip", chunks=(4, 4, 4, 1))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "one image costs 5 MB of unpacking" in said and "unpack('shapes3d')" in said
    assert files.unpack("shapes3d", tmp_path, most=3) == tmp_path / "images.npy"
    plain = files.load("shapes3d", tmp_path)
    assert torch.equal(plain.stored[:], s.stored[:]) and capsys.readouterr().out == ""
    os.truncate(tmp_path / "images.npy", 4000)
    with pytest.raises(ValueError) as e: files.load("shapes3d", tmp_path)
    one_line(e, "images.npy")


def test_cost_of_one_image(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as f:
        for k, (chunks, cost) in enumerate((((1, 64, 64, 3), 12288), ((4, 64, 64, 3), 4 * 12288), ((100, 32, 64, 1), 100 * 12288), ((100, 5, 64, 3), 100 * 65 * 192))):
            assert files.h5_cost(f.create_dataset(str(k), (1000, 64, 64, 3), "u1", chunks=chunks)) == cost


@pytest.fixture
def mpi3d(tmp_path, monkeypatch):
    shrink(monkeypatch, "mpi3d_toy", tables={"a": torch.arange(2.), "b": torch.arange(3.)}, splits={"all": 6}, files=unsized("mpi3d_toy"))
    return tmp_path / "mpi3d_toy.npz"


def test_unpacking_leaves_nothing_behind_when_it_fails(mpi3d, tmp_path):
    np.savez_compressed(mpi3d, images=COLOURED)
    files.unpack("mpi3d_toy", tmp_path, most=4)
    assert np.array_equal(np.load(tmp_path / "images.npy", allow_pickle=False), COLOURED)
    (tmp_path / "images.npy").unlink()
    raw = mpi3d.read_bytes(); mpi3d.write_bytes(raw[:40_000] + bytes(100) + raw[40_100:])
    with pytest.raises(ValueError) as e: files.unpack("mpi3d_toy", tmp_path, most=4)
    one_line(e, "mpi3d_toy.npz"); assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError) as e: files.unpack("mnist", tmp_path)
    one_line(e, "the other sets need no unpacking")


# --- memory: files of the true size, with holes in them ---

def sparse_npz(path, name, shape, marks):
    "A plain npz of zeros, as np.savez lays it out, of which only the headers and the images `marks` take room on the disk."
    head, name = io.BytesIO(), name.encode() + b".npy"
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    size, big = head.tell() + int(np.prod(shape, dtype=np.int64)), 0xFFFFFFFF
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    with open(path, "wb") as f:
        f.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, 0, big, big, len(name), 20) + name + extra + head.getvalue())
        start, each = f.tell(), int(np.prod(shape[1:]))
        for i, image in marks.items(): f.seek(start + i * each); f.write(image.tobytes())
        f.seek(start + size - head.tell()); at = f.tell()
        entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 33, 0, big, big, len(name), 20, 0, 0, 0, 0, 0) + name + extra
        f.write(entry + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(entry), at) + struct.pack("<4sIQI", b"PK\6\7", 0, at + len(entry), 1))
        f.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry), big, 0))


LAYOUTS = {"npz": ("mpi3d_toy", None), "h5 plain": ("shapes3d", {}), "h5, an image a chunk": ("shapes3d", dict(chunks=(1, 64, 64, 3), compression="gzip")),
           "h5, automatic chunks": ("shapes3d", dict(chunks=True, compression="gzip"))}


def true_size(layout, folder):
    "A file as large as the true one, with pictures of coloured squares in some thousand chunks of it and holes elsewhere. -> its path, the numbers of the pictures, the pictures."
    name, cut = LAYOUTS[layout]
    n, path, dice = files.SOURCES[name].splits["all"], folder / next(iter(files.SOURCES[name].files)), np.random.default_rng(0)
    with h5py.File(path, "w") if path.suffix == ".h5" else contextlib.nullcontext() as f:
        if f:
            images = f.create_dataset("images", (n, 64, 64, 3), "u1", **cut)
            f["labels"] = np.stack(np.meshgrid(*files.SOURCES[name].tables.values(), indexing="ij"), -1).reshape(n, -1)
        rows = images.chunks[0] if cut and cut["chunks"] is True else 0                # an image takes many of these chunks, so fill the first and the last rows of them
        numbers = np.r_[:rows, n - rows:n] if rows else np.sort(dice.choice(n, 4000, replace=False))
        pictures = dice.integers(0, 256, (len(numbers), 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        if not f: sparse_npz(path, "images", (n, 64, 64, 3), dict(zip(numbers.tolist(), pictures)))
        elif rows: images[:rows], images[n - rows:] = pictures[:rows], pictures[rows:]
        else:
            for i, picture in zip(numbers.tolist(), pictures): images[i] = picture
        if cut and "chunks" in cut: assert images.id.get_num_chunks() > 1000
    np.save(folder / "numbers.npy", numbers)
    return path, numbers, pictures


OURS = """
import torch
from disdiff_tutorial.data import files
files.SOURCES[name] = files.SOURCES[name]._replace(files={f: files.File(None, None, None) for f in files.SOURCES[name].files})
torch.zeros(size, 3, 64, 64).long()
idle = now("VmRSS"); s = files.load(name, root); opened = now("VmHWM")
for k in range(times): x, _ = s.sample(size, torch.Generator().manual_seed(k), among=torch.from_numpy(numbers))
ends = s.stored[numbers[[0, -1]].tolist()]
"""
PLAIN = """
idle = now("VmRSS"); s = np.memmap(path, "u1", "r", start, (n, 64, 64, 3)) if start else h5py.File(path)["images"]; opened = now("VmHWM")
for k in range(times): x = np.stack([s[i] for i in np.random.default_rng(k).choice(numbers, size)])
ends = np.stack([s[numbers[0]], s[numbers[-1]]])
"""


def memory(layout, folder, plain=False, times=20):
    """Resident MB of a process of its own that opens the file of `true_size` and reads `times` random batches: idle, at its peak once the file is open, at its peak in the end; and the sum of the first and last picture.
    Our loaders; `plain`: numpy and h5py alone, without torch."""
    name, size = LAYOUTS[layout][0], 2 if "automatic" in layout else 256               # there an image costs 184 MB of unpacking
    path = folder / next(iter(files.SOURCES[name].files))
    start = files.npz_member(path, "images").start if path.suffix == ".npz" else None
    code = f"""
import re, h5py, numpy as np
now = lambda what: int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
name, root, path, n, start, size, times = {name!r}, {str(folder)!r}, {str(path)!r}, {files.SOURCES[name].splits["all"]}, {start}, {size}, {times}
numbers = np.load(root + "/numbers.npy")
{PLAIN if plain else OURS}
print(idle, opened, now("VmHWM"), int(ends.sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(w) for w in done.stdout.splitlines()[-1].split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure memory with")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_a_file_of_the_true_size(tmp_path, layout):
    path, numbers, pictures = true_size(layout, tmp_path)
    if path.stat().st_blocks * 512 > 2e9: pytest.skip("this file system has no holes")
    idle, opened, end, total = memory(layout, tmp_path, times=1 if "automatic" in layout else 20)
    print(f"{layout}: {path.stat().st_size / 1e9:.2f} GB, {opened - idle:.0f} MB to open, {end - idle:.0f} MB with the batches")
    assert path.stat().st_size > (12 * 10**9 if layout == "npz" else 5 * 10**9 if layout == "h5 plain" else 10**7) and total == pictures[[0, -1]].sum()
    assert opened - idle < 200 and end - idle < 200, (opened - idle, end - idle)


# --- MPI3D, Cars3D ---

def test_mpi3d(mpi3d, tmp_path, monkeypatch):
    truth = torch.from_numpy(COLOURED).permute(0, 3, 1, 2)
    np.savez(mpi3d, images=COLOURED)
    s = files.load("mpi3d_toy", tmp_path)
    assert torch.equal(s.stored[:], truth) and torch.equal(s.images(torch.tensor([[1, 2]])).cpu(), truth[5:])
    np.savez_compressed(mpi3d, images=COLOURED)
    assert torch.equal(files.load("mpi3d_toy", tmp_path).stored[:], truth)                 # compressed but small: read
    monkeypatch.setattr(files, "LIMIT", 1000)
    with pytest.raises(ValueError) as e: files.load("mpi3d_toy", tmp_path)
    one_line(e, "unpack it once: python -m zipfile -e ", "mpi3d_toy.npz")
    command = str(e.value).split("once: python ")[1].split()
    subprocess.run([sys.executable, *command], check=True, cwd=core.checkout())            # what the line says works
    assert torch.equal(files.load("mpi3d_toy", tmp_path).stored[:], truth) and isinstance(files.npy_array(tmp_path / "images.npy", "u1", COLOURED.shape), np.memmap)
    os.truncate(tmp_path / "images.npy", 5000)
    with pytest.raises(ValueError) as e: files.load("mpi3d_toy", tmp_path)
    one_line(e, "images.npy", "5,000")


def test_get_checks_what_load_leaves_unchecked(mpi3d, tmp_path, monkeypatch):
    "As the card of MPI3D-toy says: a changed pixel loads, and `get` finds it, without any download."
    np.savez(mpi3d, images=COLOURED)
    raw = bytearray(mpi3d.read_bytes())
    shrink(monkeypatch, "mpi3d_toy", mirrors=("http://127.0.0.1:9",), files={mpi3d.name: File(None, None, None, hashlib.md5(raw).hexdigest())})
    assert files.get("mpi3d_toy", tmp_path) == [mpi3d]
    raw[5000] ^= 1; mpi3d.write_bytes(raw)
    assert len(files.load("mpi3d_toy", tmp_path)) == 6
    with pytest.raises(ValueError) as e: files.get("mpi3d_toy", tmp_path)
    one_line(e, "md5", "mpi3d_toy.npz")


def test_damaged_npz(mpi3d, tmp_path):
    "Cut anywhere, with a stored length that lies, encrypted, or no zip at all: one line, naming the file."
    np.savez(mpi3d, images=COLOURED)
    raw = mpi3d.read_bytes()
    lies = bytearray(raw); lies[26:28] = b"\xff\xff"                                       # the local header's length of the name
    locked = bytearray(raw); locked[6] |= 1; locked[raw.index(b"PK\1\2") + 8] |= 1
    for bad in (b"", raw[:20], raw[:5000], raw[:-1], raw[:-30], raw[5000:], b"<html>", bytes(lies), bytes(locked), raw.replace(b"NUMPY", b"numpy")):
        mpi3d.write_bytes(bad)
        with pytest.raises(ValueError) as e: files.load("mpi3d_toy", tmp_path)
        one_line(e, "mpi3d_toy.npz", "found ")
    assert [p.name for p in tmp_path.iterdir()] == ["mpi3d_toy.npz"]


def test_zip_bomb_is_not_unpacked(mpi3d, tmp_path):
    import tracemalloc
    zipped(mpi3d, {"images.npy": npy(COLOURED) + bytes(1 << 27)})
    tracemalloc.start()
    with pytest.raises(ValueError) as e: files.load("mpi3d_toy", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    one_line(e, "bytes of images in", "as its header says"); assert peak < 4e6 and mpi3d.stat().st_size < 1e6


io_ = pytest.importorskip("scipy.io")
def mat(**arrays): f = io.BytesIO(); io_.savemat(f, arrays, do_compression=True); return f.getvalue()
def tarred(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(body, bytes): info.size = len(body)
            else: info.type, info.linkname, body = *body, b""
            tar.addfile(info, io.BytesIO(body))
    return path


MESH = [np.random.default_rng(k).integers(0, 256, (128, 128, 3, 3, 2), dtype=np.uint8) for k in range(2)]
CARS = {"data/cars/list.txt": b"car_001_mesh\ncar_002_mesh\n", "data/sprites/big.mat": b"not read"} | {f"data/cars/car_00{k + 1}_mesh.mat": mat(im=m, mask=m[:, :, 0]) for k, m in reversed(list(enumerate(MESH)))}


@pytest.fixture
def cars3d(tmp_path, monkeypatch):
    shrink(monkeypatch, "cars3d", tables={"elevation": torch.arange(2.), "azimuth": torch.arange(3.), "object_type": torch.arange(2.)}, splits={"all": 12}, files=unsized("cars3d"))
    return tmp_path / "nips2015-analogy-data.tar.gz"


def test_cars3d(cars3d, tmp_path):
    "The archive, the folder in it, and both kinds of npz give the same images in the same order: elevation, azimuth, car."
    from PIL import Image
    tarred(cars3d, CARS)
    s = files.load("cars3d", tmp_path)
    for e, a, o in ((0, 0, 0), (1, 2, 0), (0, 1, 1)):
        thumb = Image.fromarray(np.ascontiguousarray(MESH[o][..., a, e])); thumb.thumbnail((64, 64), Image.Resampling.LANCZOS)   # disentanglement_lib's way
        assert np.array_equal(s.images(torch.tensor([[e, a, o]]))[0].permute(1, 2, 0).cpu(), thumb)
    assert [p.name for p in tmp_path.iterdir()] == [cars3d.name]                            # nothing was unpacked
    full = np.stack([m.transpose(4, 3, 0, 1, 2) for m in MESH], 2).reshape(12, 128, 128, 3)
    for key, images, save in (("imgs", s.stored[:].permute(0, 2, 3, 1).numpy(), np.savez), ("images", full, np.savez_compressed)):
        save(tmp_path / "cars3d.npz", **{key: images})
        assert torch.equal(files.load("cars3d", tmp_path).stored[:], s.stored[:])
    (tmp_path / "cars3d.npz").unlink(); cars3d.unlink(); (tmp_path / "cars").mkdir()
    for name, body in CARS.items():
        if "/cars/" in name: (tmp_path / "cars" / Path(name).name).write_bytes(body)
    assert torch.equal(files.load("cars3d", tmp_path).stored[:], s.stored[:])


one = "data/cars/car_001_mesh.mat"
BAD_CARS = {
    "climbs": (CARS | {"../../cars/evil.mat": b"x"}, "'../../cars/evil.mat'"), "absolute": (CARS | {"/cars/evil.mat": b"x"}, "'/cars/evil.mat'"),
    "symlink": (CARS | {"data/cars/evil.mat": (tarfile.SYMTYPE, "/etc/passwd")}, "evil.mat"), "hard link": (CARS | {"data/cars/evil.mat": (tarfile.LNKTYPE, "../../../etc/passwd")}, "evil.mat"),
    "device": (CARS | {"data/cars/evil.mat": (tarfile.CHRTYPE, "")}, "evil.mat"), "a car less": ({k: v for k, v in CARS.items() if k != one}, "2 files of MATLAB"), "empty": ({}, "2 files of MATLAB"),
    "cut mat": (CARS | {one: CARS[one][:5000]}, "car_001_mesh.mat to be a MATLAB 5 file"), "no mat": (CARS | {one: b"hello"}, "car_001_mesh.mat"), "empty mat": (CARS | {one: b""}, "car_001_mesh.mat"),
    "wrong shape": (CARS | {one: mat(im=MESH[0][:64])}, "(64, 128, 3, 3, 2)"), "wrong type": (CARS | {one: mat(im=MESH[0].astype("f8"))}, "double"), "no im": (CARS | {one: mat(pic=MESH[0])}, "'im'"),
    "cells": (CARS | {one: mat(im=np.array([{"a": 1}], dtype=object))}, "cell")}


@pytest.mark.parametrize("case", BAD_CARS)
def test_bad_cars3d(cars3d, tmp_path, case):
    members, words = BAD_CARS[case]
    tarred(cars3d, members)
    with pytest.raises(ValueError) as e: files.load("cars3d", tmp_path)
    one_line(e, words, "expected ", cars3d.name)
    assert [p.name for p in tmp_path.iterdir()] == [cars3d.name] and not (tmp_path.parent / "cars").exists()


def test_damaged_tar(cars3d, tmp_path, monkeypatch):
    raw = tarred(cars3d, CARS).read_bytes()
    for bad in (b"", raw[:100], raw[:len(raw) // 2], b"<html>", gzip.compress(b"hello" * 500), raw[:9000] + b"?" + raw[9001:]):
        cars3d.write_bytes(bad)
        with pytest.raises(ValueError) as e: files.load("cars3d", tmp_path)
        one_line(e, cars3d.name)
    tarred(cars3d, {"padding": bytes(1 << 25)})
    with pytest.raises(ValueError) as e: list(files.tar_members(cars3d, "mat", limit=1 << 20))
    one_line(e, "a tar of bounded size", cars3d.name)
    tarred(cars3d, {"data/cars/a.mat": bytes(1 << 20)})
    with pytest.raises(ValueError) as e: list(files.tar_members(cars3d, "mat", most=1 << 10))
    one_line(e, "members of at most 1,024 bytes", cars3d.name)


def test_cars3d_folder_with_strangers(cars3d, tmp_path):
    "Files that macOS adds, and folders, are no cars."
    (tmp_path / "cars/x.mat").mkdir(parents=True); (tmp_path / "cars/._car_001_mesh.mat").write_bytes(b"mac")
    for name, body in CARS.items():
        if "/cars/" in name: (tmp_path / "cars" / Path(name).name).write_bytes(body)
    assert files.load("cars3d", tmp_path).stored.shape == (12, 3, 64, 64)


def mat_of(dims, promised, body):
    "A MATLAB 5 file with one compressed variable `im` of size `dims`, whose values claim `promised` bytes."
    sub = lambda kind, raw: struct.pack("<II", kind, len(raw)) + raw + bytes(-len(raw) % 8)
    head = sub(6, struct.pack("<II", 9, 0)) + sub(5, struct.pack(f"<{len(dims)}i", *dims)) + sub(1, b"im") + struct.pack("<II", 2, promised)
    packed = __import__("zlib").compress(struct.pack("<II", 14, len(head) + promised) + head + body)
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed


@pytest.mark.parametrize("promised, body", [(1 << 31, bytes(1 << 27)), (1 << 31, b""), (24, bytes(1 << 27))])
def test_mat_bomb_is_not_unpacked(tmp_path, promised, body):
    "Dims of 24 bytes, and a variable of 128 MB that promises 2 GB or 24 bytes, or an empty one: resident memory stays where it was, in a process of its own. The honest file is read."
    if not Path("/proc/self/status").exists(): pytest.skip("no /proc to measure memory with")
    assert np.array_equal(files.mat_array(io.BytesIO(mat_of((2, 3, 4), 24, bytes(range(24)))), Path("a.mat"), "im", (2, 3, 4)).ravel("F"), range(24))
    raw = mat_of((2, 3, 4), promised, body); (tmp_path / "a.mat").write_bytes(raw)
    code = f"""
import re, scipy.io
from disdiff_tutorial.data import files
now = lambda what: int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = now("VmHWM")
try: files.mat_array(open({str(tmp_path / "a.mat")!r}, "rb"), files.Path("a.mat"), "im", (2, 3, 4))
except ValueError as err: print(err)
print(now("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *said, grown = done.stdout.splitlines()
    assert done.returncode == 0 and float(grown) < 30, (done.stderr, grown)
    if promised > 24: one_line(said[0], "a.mat to be a MATLAB 5 file"); assert len(said) == 1
    with pytest.raises(ValueError) as e: files.mat_array(io.BytesIO(raw[:128] + raw[128:] * 200), Path("a.mat"), "im", (2, 3, 4))
    one_line(e, "a.mat")


# --- CIFAR-10, SVHN, Fashion-MNIST ---

PART = SHARED / "cifar10-part.npz"


def cifar_bytes(images, labels): return b"".join(bytes([y]) + np.ascontiguousarray(x.transpose(2, 0, 1)).tobytes() for x, y in zip(images, labels))


@pytest.mark.skipif(not PART.is_file(), reason="the part of CIFAR-10 is not on this machine")
def test_cifar10_with_its_real_pixels(tmp_path, monkeypatch):
    "The lossless part of CIFAR-10, written into an archive like the official one, then read back."
    with np.load(PART, allow_pickle=False) as z: x, y, x_test, y_test = (z[k] for k in ("train_images", "train_labels", "test_images", "test_labels"))
    parts = {f"data_batch_{k + 1}.bin": cifar_bytes(x[k * 1017:(k + 1) * 1017], y[k * 1017:(k + 1) * 1017]) for k in range(5)} | {"test_batch.bin": cifar_bytes(x_test, y_test)}
    path = tarred(tmp_path / "cifar-10-binary.tar.gz", {f"cifar-10-batches-bin/{k}": v for k, v in (parts | {"readme.html": b"<html>", "batches.meta.txt": b"airplane"}).items()})
    known = {path.name: File(None, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())}
    shrink(monkeypatch, "cifar10", splits={"train": 5085, "test": 1017}, files=known)
    for split, images, labels in (("train", x, y), ("test", x_test, y_test)):
        s = files.load("cifar10", tmp_path, split)
        assert np.array_equal(s.images.permute(0, 2, 3, 1), images) and np.array_equal(s.labels, labels) and s.names[6] == "frog" and s.labels.dtype == torch.int64
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for k, v in parts.items(): (tmp_path / "cifar-10-batches-bin" / k).write_bytes(v)
    assert np.array_equal(files.load("cifar10", tmp_path).labels, y)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(ValueError) as e: files.load("cifar10", tmp_path)
    one_line(e, "data_batch_3.bin", "cifar-10-batches-bin")


def test_bad_cifar10(tmp_path, monkeypatch):
    shrink(monkeypatch, "cifar10", files=unsized("cifar10"), splits={"train": 5, "test": 1})
    good, path = cifar_bytes(np.zeros((1, 32, 32, 3), np.uint8), [9]), tmp_path / "cifar-10-binary.tar.gz"
    for body, words in ((good[:-1], "3,072 bytes"), (b"", "0 bytes"), (b"\x0a" + good[1:], "labels 0 to 9"), (good * 2, "1 images")):
        tarred(path, {"cifar-10-batches-bin/test_batch.bin": body})
        with pytest.raises(ValueError) as e: files.load("cifar10", tmp_path, "test")
        one_line(e, words, "cifar-10-binary.tar.gz")
    shrink(monkeypatch, "cifar10", files={path.name: File(None, path.stat().st_size, "0" * 64)})
    with pytest.raises(ValueError) as e: files.load("cifar10", tmp_path, "test")
    one_line(e, "sha256 000000000000")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("compressed", [False, True])
def test_svhn(tmp_path, monkeypatch, compressed):
    x, y = np.random.default_rng(3).integers(0, 256, (32, 32, 3, 11), dtype=np.uint8), np.array([[10], *([k] for k in range(1, 11))], np.uint8)
    shrink(monkeypatch, "svhn", splits={"train": 5, "test": 11}, files=unsized("svhn"))
    io_.savemat(tmp_path / "test_32x32.mat", {"X": x, "y": y}, do_compression=compressed)
    s = files.load("svhn", tmp_path, "test")
    assert np.array_equal(s.images, x.transpose(3, 2, 0, 1)) and s.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0] and s.images.is_contiguous()
    raw = (tmp_path / "test_32x32.mat").read_bytes()
    for bad, words in ((mat(X=x, y=y + 1), "labels 1 to 10"), (mat(X=x, y=np.where(y == 3, np.nan, y)), "labels 1 to 10"), (mat(X=x[..., :0], y=y), "shape (32, 32, 3, 11)"), (mat(X=x, y=y[:5]), "y of type"),
                       (mat(X=x), "'y'"), (raw[:200], "MATLAB 5"), (raw[:-200], "MATLAB 5"), (b"", "MATLAB 5"), (b"MATLAB 7.3 MAT-file" + bytes(512), "MATLAB 5")):
        (tmp_path / "test_32x32.mat").write_bytes(bad)
        with pytest.raises(ValueError) as e: files.load("svhn", tmp_path, "test")
        one_line(e, words, "test_32x32.mat")


@pytest.mark.skipif(FASHION is None, reason="Fashion-MNIST is not on this machine (Debian: dataset-fashion-mnist)")
@pytest.mark.parametrize("split, n", [("train", 60_000), ("test", 10_000)])
def test_real_fashion_mnist(split, n):
    s = files.load("fashion_mnist", FASHION, split)
    assert s.images.shape == (n, 1, 28, 28) and s.labels.bincount().tolist() == [n // 10] * 10 and s.name == "fashion_mnist"
    if split == "train": assert abs(s.images.float().mean() / 255 - .2860) < 5e-5 and s.labels[:5].tolist() == [9, 0, 0, 3, 0]


# --- pictures ---

Image = pytest.importorskip("PIL.Image", reason="Pillow, of the extra `files`, is not installed")
FACES = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (7, 6, 3), dtype=np.uint8)).resize((178, 218), Image.Resampling.BICUBIC) for k in range(6)]
def encoded(image, kind="JPEG"): f = io.BytesIO(); image.save(f, kind); return f.getvalue()
JPEGS = {f"{k + 1:06}.jpg": encoded(face) for k, face in enumerate(FACES)}
ATTRIBUTES = b"6\r\nBald Smiling \r\n" + b"".join(f"{n}  {2 * (k % 2) - 1:2}  {2 * (k > 3) - 1:2}\r\n".encode() for k, n in enumerate(JPEGS))
PARTITION = b"".join(f"{n} {k // 2}\n".encode() for k, n in enumerate(JPEGS))


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    shrink(monkeypatch, "celeba", splits={"train": 2, "valid": 2, "test": 2, "all": 6}, files=unsized("celeba"))
    def write(pictures=JPEGS, attributes=ATTRIBUTES, partition=PARTITION):
        zipped(tmp_path / "img_align_celeba.zip", {f"img_align_celeba/{n}": b for n, b in pictures.items()}, zipfile.ZIP_STORED)
        (tmp_path / "list_attr_celeba.txt").write_bytes(attributes); (tmp_path / "list_eval_partition.txt").write_bytes(partition)
        return tmp_path
    return write


def test_celeba(celeba, tmp_path):
    root = celeba()
    s = files.load("celeba", root, "all")
    assert s.names == ("Bald", "Smiling") and s.labels.T.tolist() == [[0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1]] and s.images.shape == (6, 3, 64, 64)
    for split, chosen in (("train", [0, 1]), ("valid", [2, 3]), ("test", [4, 5])):
        part = files.load("celeba", root, split)
        assert torch.equal(part.images[:], s.images[chosen]) and torch.equal(part.labels, s.labels[chosen])
    decoded = Image.open(io.BytesIO(JPEGS["000005.jpg"]))
    for kw, box, side in (({}, (19, 39, 159, 179), 64), ({"crop": 148, "size": 48}, (15, 35, 163, 183), 48), ({"crop": (25, 57, 128)}, (25, 57, 153, 185), 64)):
        truth = np.asarray(decoded.crop(box).resize((side, side), Image.Resampling.BILINEAR))
        assert np.array_equal(files.load("celeba", root, "all", **kw).images[4].permute(1, 2, 0), truth)
    with zipfile.ZipFile(root / "img_align_celeba.zip") as z: z.extractall(root)
    assert torch.equal(files.load("celeba", root, "all").images[:], s.images[:])             # the folder does as well


@pytest.mark.parametrize("change, words", [
    (dict(pictures={k: v for k, v in JPEGS.items() if k != "000004.jpg"}), ["000004.jpg in", "img_align_celeba.zip"]), (dict(partition=PARTITION[:-14]), ["the same 6 faces"]),
    (dict(attributes=ATTRIBUTES.replace(b"000003.jpg", b"000033.jpg")), ["the same 6 faces"]), (dict(attributes=ATTRIBUTES.replace(b" 1", b" 2", 1)), ["line 2 of", "list_attr_celeba.txt"]),
    (dict(attributes=ATTRIBUTES[:-5]), ["line 6 of"]), (dict(partition=PARTITION.replace(b" 2", b" 3")), ["line 5 of", "list_eval_partition.txt"]), (dict(partition=b""), ["lines in"]), (dict(attributes=b"\xff\xfe\0" * 9), ["lines in"]),
    (dict(pictures={}), ["000001.jpg in"]), (dict(attributes=ATTRIBUTES.replace(b"Bald", b"Bald Old")), ["a name for each of 2 columns", "found 3"]), (dict(attributes=b"7" + ATTRIBUTES[1:]), ["6 in line 1", "7"]),
    (dict(attributes=ATTRIBUTES.replace(b"000003", b"000001"), partition=PARTITION.replace(b"000003", b"000001")), ["each once", "found 5 and 5"]), (dict(partition=PARTITION.replace(b"\n", b" 1\n")), ["one number for each face", "found 2"])])
def test_bad_celeba(celeba, change, words):
    with pytest.raises(ValueError) as e: files.load("celeba", celeba(**change), "all")
    one_line(e, "expected ", *words)


def test_bad_pictures(celeba, tmp_path):
    "Each is found when it is read; the others are still readable."
    big = encoded(Image.new("1", (9000, 9000)), "PNG")
    for body, words in ((JPEGS["000001.jpg"][:700], "JPEG"), (b"", "JPEG"), (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "JPEG"), (encoded(FACES[0], "GIF"), "JPEG"), (big, "9000 x 9000")):
        s = files.load("celeba", celeba(JPEGS | {"000002.jpg": body}), "train")
        assert s.images[0].shape == (3, 64, 64)
        with pytest.raises(ValueError) as e: s.images[:]
        one_line(e, "000002.jpg", words)
    with pytest.raises(ValueError) as e: files.load("celeba", celeba(), crop=(100, 0, 128)).images[0]
    one_line(e, "a picture that holds the square (100, 0, 128)")


def test_zip_bomb_among_pictures(celeba, tmp_path):
    zipped(tmp_path / "z.zip", {"a.png": bytes(files.PICTURE + 1)})
    names, fetch = files.in_zip(tmp_path / "z.zip")
    with pytest.raises(ValueError) as e: fetch(names[0])
    one_line(e, "pictures of at most", "z.zip")


@pytest.mark.skipif(not (SHARED / "lfw-64.zip").is_file(), reason="lfw-64.zip is not on this machine")
def test_real_lfw():
    "All faces, a block at a time: those that Pillow makes of the same bytes, in the order of their numbers."
    s, total = files.load("lfw", SHARED), 0
    assert s.images.shape == (13_233, 3, 64, 64) and s.labels is None
    with zipfile.ZipFile(SHARED / "lfw-64.zip") as z:
        assert sorted(z.namelist()) == [f"{i:05}.jpg" for i in range(13_233)]
        for part in torch.arange(13_233).split(1024):
            truth = np.stack([np.asarray(Image.open(io.BytesIO(z.read(f"{i:05}.jpg")))) for i in part.tolist()])
            assert truth.dtype == np.uint8 and np.array_equal(s.images[part].permute(0, 2, 3, 1), truth)
            total += truth.sum(dtype=np.int64)
    assert abs(total / (13_233 * 3 * 64 * 64) - 114.94) < .05


def test_lfw_folder_of_scikit_learn(tmp_path, monkeypatch):
    "The folder that fetch_lfw_people leaves, found in scikit-learn's own place; 250 pixels, of which the central 128 are kept."
    shrink(monkeypatch, "lfw", splits={"all": 3})
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sk"))
    with pytest.raises(Unavailable) as e: files.load("lfw", tmp_path / "none")
    one_line(e, "fetch_lfw_people")
    face = FACES[0].resize((250, 250))
    for person, k in (("Ann_B", 1), ("Ann_B", 2), ("Zoe_Y", 1)):
        (tmp_path / "sk/lfw_home/lfw_funneled" / person).mkdir(parents=True, exist_ok=True); face.save(tmp_path / f"sk/lfw_home/lfw_funneled/{person}/{person}_000{k}.jpg")
    s = files.load("lfw", tmp_path / "none")
    assert s.labels.tolist() == [0, 0, 1] and s.names == ("Ann_B", "Zoe_Y")
    truth = Image.open(tmp_path / "sk/lfw_home/lfw_funneled/Zoe_Y/Zoe_Y_0001.jpg").crop((61, 61, 189, 189)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(s.images[2].permute(1, 2, 0), truth)
    (tmp_path / "sk/lfw_home/lfw_funneled/Zoe_Y/Zoe_Y_0001.jpg").unlink()
    with pytest.raises(ValueError) as e: files.load("lfw", tmp_path / "none")
    one_line(e, "3 images", "found 2")


def test_lfw_archive_that_scikit_learn_publishes(tmp_path, monkeypatch):
    "The row is scikit-learn's own; the archive is checked, and unpacked by the command that the message says."
    from sklearn.datasets import _lfw
    (filename, file), = files.SOURCES["lfw"].files.items()
    assert (filename, file.sha256) == (_lfw.FUNNELED_ARCHIVE.filename, _lfw.FUNNELED_ARCHIVE.checksum) and _lfw.FUNNELED_ARCHIVE.url in files.SOURCES["lfw"].by_hand
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "no"))
    path = tarred(tmp_path / filename, {f"lfw_funneled/{who}/{who}_0001.jpg": JPEGS["000001.jpg"] for who in ("Ann_B", "Zoe_Y")})
    with pytest.raises(ValueError) as e: files.load("lfw", tmp_path)
    one_line(e, filename, file.sha256[:12])
    shrink(monkeypatch, "lfw", splits={"all": 2}, files={filename: File(None, None, hashlib.sha256(path.read_bytes()).hexdigest())})
    assert files.get("lfw", tmp_path) == [path]
    with pytest.raises(Unavailable) as e: files.load("lfw", tmp_path)
    one_line(e, "lfw_funneled", "found only its tgz", how := f"python -m tarfile -e {path} {tmp_path}")
    subprocess.run([sys.executable, *how.split()[1:]], check=True)
    assert files.load("lfw", tmp_path).names == ("Ann_B", "Zoe_Y")


def test_lsun(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb", reason="lmdb, of the extra `files`, is not installed")
    shrink(monkeypatch, "lsun_church", splits={"train": 4, "valid": 2}, files=unsized("lsun_church"))
    with pytest.raises(Unavailable) as e: files.load("lsun_church", tmp_path)
    one_line(e, "disdiff data get lsun_church", "church_outdoor_train_lmdb.zip")
    churches = {f"{k:040x}".encode(): encoded(FACES[k].resize((300, 256)), "WEBP") for k in range(4)}
    folder = tmp_path / "church_outdoor_train_lmdb"
    with lmdb.open(str(folder), map_size=1 << 24) as base, base.begin(write=True) as t:
        for k, v in churches.items(): t.put(k, v)
    s = files.load("lsun_church", tmp_path, size=48)
    truth = Image.open(io.BytesIO(list(churches.values())[2])).convert("RGB").crop((22, 0, 278, 256)).resize((48, 48), Image.Resampling.BILINEAR)
    assert s.images.shape == (4, 3, 48, 48) and np.array_equal(s.images[2].permute(1, 2, 0), truth) and s.labels is None
    raw = (folder / "data.mdb").read_bytes()
    for bad in (b"", raw[:5000], raw[:8192], raw[:len(raw) - 4096], b"<html>" + raw, raw[:16] + bytes(8) + raw[24:]):
        (folder / "data.mdb").write_bytes(bad)
        with pytest.raises(ValueError) as e: files.load("lsun_church", tmp_path)
        one_line(e, "data.mdb")
    (tmp_path / "valid").mkdir()
    for k in range(2): FACES[k].save(tmp_path / f"valid/{k}.jpg")
    assert files.load("lsun_church", tmp_path, "valid").images[:].shape == (2, 3, 64, 64)   # a folder of pictures does as well
    zipped(tmp_path / "church_outdoor_train_lmdb.zip", {"church_outdoor_train_lmdb/data.mdb": raw})
    import shutil; shutil.rmtree(folder)
    with pytest.raises(Unavailable) as e: files.load("lsun_church", tmp_path)
    one_line(e, "unpack it once: python -m zipfile -e ")


def churches(folder, n, size=(24, 20)):
    "An LMDB folder of `n` small pictures as WebP, some above and some below the size that gets pages of its own."
    lmdb = pytest.importorskip("lmdb", reason="lmdb, of the extra `files`, is not installed")
    with lmdb.open(str(folder), map_size=1 << 26) as base, base.begin(write=True) as t:
        for k in range(n):
            noise = Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8))
            t.put(hashlib.sha1(bytes([k])).hexdigest().encode(), encoded(noise if k % 2 else noise.resize((300, 256)), "WEBP"))
        return {bytes(k): bytes(v) for k, v in t.cursor()}


class Rows(torch.utils.data.Dataset):
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images)
    def __getitem__(self, i): return self.images[i]


def by_workers(images, context): return torch.cat(list(torch.utils.data.DataLoader(Rows(images), 8, num_workers=2, multiprocessing_context=context)))


def test_lmdb_is_read_as_the_library_reads_it(tmp_path, monkeypatch):
    "All keys in order, all values; twice in one process, and in forked workers."
    truth = churches(tmp_path / "church_outdoor_val_lmdb", 200)
    names, fetch = files.in_lmdb(tmp_path / "church_outdoor_val_lmdb")
    assert names == list(truth) and [fetch(k) for k in names] == list(truth.values()) and min(map(len, truth.values())) < 1000 < 4096 < max(map(len, truth.values()))
    shrink(monkeypatch, "lsun_church", splits={"train": 0, "valid": 200}, files=unsized("lsun_church"))
    one, two = (files.load("lsun_church", tmp_path, "valid", size=8).images for _ in range(2))
    assert torch.equal(one[:], two[:]) and torch.equal(by_workers(one, "fork"), one[:])


def test_damaged_lmdb(tmp_path, monkeypatch):
    "150 changes to headers, pointers, whole pages and single bits: the same pictures, or one line, in this process."
    truth = churches(folder := tmp_path / "church_outdoor_val_lmdb", 40)
    shrink(monkeypatch, "lsun_church", splits={"train": 0, "valid": 40}, files=unsized("lsun_church"))
    dice, path, refused = np.random.default_rng(0), folder / "data.mdb", [0] * 5
    raw = path.read_bytes()
    keys = [n for n in range(2, len(raw) // 4096) if struct.unpack_from("<Q2xH", raw, 4096 * n) in ((n, 1), (n, 2))]
    for k in range(150):
        bad, kind, page = bytearray(raw), k % 5, 4096 * dice.choice(keys)
        if kind == 0: bad[dice.integers(8192, len(bad))] ^= 1 << dice.integers(8)
        elif kind == 1: bad[page:page + 16] = dice.bytes(16)
        elif kind == 2: bad[page + 16:page + 48] = dice.bytes(32)
        elif kind == 3: bad[page:page + 4096] = dice.bytes(4096)
        else: bad[dice.choice([0, 4096]) + dice.integers(16, 152)] = dice.integers(256)
        path.write_bytes(bad)
        try: assert len(files.load("lsun_church", tmp_path, "valid", size=8).images[:]) == len(truth)
        except ValueError as e: one_line(e, "church_outdoor_val_lmdb"); refused[kind] += 1
    assert min(refused[1:4]) > 20, refused                                  # it finds most of them


def test_zip_in_workers(celeba):
    "Workers share no place in the zip with each other: forked, and started anew from a pickle."
    many = {f"{k:06}.jpg": body for k in range(1, 201) for body in [JPEGS[f"{k % 6 + 1:06}.jpg"]]}
    root = celeba(many, b"200\nBald\n" + b"".join(f"{n} 1\n".encode() for n in many), b"".join(f"{n} 0\n".encode() for n in many))
    files.SOURCES["celeba"] = files.SOURCES["celeba"]._replace(splits={"all": 200})            # put back by the fixture
    images = files.load("celeba", root, size=8).images
    for _ in range(3): assert torch.equal(by_workers(images, "fork"), images[:])


def test_stored_images_travel_as_the_call_that_opened_them(tmp_path):
    import pickle
    for k in range(5): Image.new("RGB", (9, 9), (k, 0, 0)).save(tmp_path / f"{k}.png")
    images = files.load("folder", tmp_path, size=8, crop=[0, 0, 9]).images
    assert torch.equal(pickle.loads(pickle.dumps(images))[:], images[:]) and torch.equal(by_workers(images, "spawn"), images[:])
    with pytest.raises(ValueError) as e: pickle.dumps(files.stored_rows(COLOURED))
    one_line(e, "images that `load` opened")


def test_factor_files_travel_too(mpi3d, tmp_path):
    import pickle
    np.savez(mpi3d, images=COLOURED)
    s = files.load("mpi3d_toy", tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(s)).stored[:], s.stored[:])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_stored_takes_numbers_of_every_type(kind):
    "torch would take uint8 for a mask."
    stored, truth = files.stored_rows(COLOURED), torch.from_numpy(COLOURED).permute(0, 3, 1, 2)
    index = np.array([1, 0, 1, 5, 5, 2], kind)
    for i in (index, torch.from_numpy(index), index[::-1]): assert torch.equal(stored[i], truth[np.asarray(i).astype(np.int64)])
    assert torch.equal(stored[index > 1], truth[index > 1])
    with pytest.raises(ValueError) as e: stored[torch.ones(2)]
    one_line(e, "whole numbers of images")


def test_folder_with_strangers(tmp_path):
    "A folder named like a picture and a link to nowhere are no pictures."
    (tmp_path / "x.jpg").mkdir(); (tmp_path / "z.jpg").symlink_to("/nowhere"); Image.new("RGB", (9, 9), (5, 0, 0)).save(tmp_path / "y.png")
    assert files.load("folder", tmp_path, size=4).images[:].amax((2, 3)).tolist() == [[5, 0, 0]]


def test_grey_of_16_bits(tmp_path):
    "Scaled to 8, not clipped."
    wide = np.array([[0, 257, 128 * 257], [60000, 65535, 300], [129, 128, 65407]], np.uint16)
    Image.fromarray(wide).save(tmp_path / "16.png")
    got = files.load("folder", tmp_path, size=3).images[0]
    assert (got == torch.from_numpy((wide / 257).round().astype("u1"))).all() and got[0, 1].tolist() == [233, 255, 1]


def test_a_picture_stands_as_its_exif_says(tmp_path):
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 20, 20)); exif[0x112] = 6                 # the left is the top
    image.save(tmp_path / "e.jpg", exif=exif, quality=100)
    top, bottom = files.load("folder", tmp_path, size=20).images[0][0, [0, -1], 10].tolist()
    assert top > 200 and bottom < 50
    assert files.load("folder", tmp_path, size=8, crop=(0, 20, 20)).images[0].amax() < 50     # the crop is of the upright picture


def test_folder(tmp_path):
    for name, colour in (("b/2.png", 30), ("a/1.jpg", 60), ("b/.hidden.png", 0), ("notes.txt", 0)):
        (tmp_path / name).parent.mkdir(exist_ok=True); Image.new("L", (40, 50), colour).save(tmp_path / name, "PNG")
    s = files.load("folder", tmp_path, size=8)
    assert s.names == ("a", "b") and s.labels.tolist() == [0, 1] and s.images[:].flatten(1).float().mean(1).tolist() == [60, 30]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as e: files.load("folder", tmp_path / "empty")
    one_line(e, "pictures in", "empty", "found none")
    with pytest.raises(FileNotFoundError) as e: files.load("folder", tmp_path / "gone")
    one_line(e, "gone")


# --- arguments, the table, the command ---

def test_whole_sizes_of_every_type(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert files.load("folder", tmp_path, size=np.int64(4), crop=(np.int32(1), 0, torch.tensor(5))).images[:].shape == (1, 3, 4, 4)


@pytest.mark.parametrize("crop", [("a", "b", 10), (1.5, 2, 10), (0, 0), (0, 0, True), (0, 0, 0), (None, 0, 5), True, 2.5, "64", float("nan"), 5000])
def test_bad_crops(tmp_path, crop):
    with pytest.raises(ValueError) as e: files.load("folder", tmp_path, crop=crop)
    one_line(e, "size from 1 to 4096, crop likewise", "found ")
    if not isinstance(crop, tuple):
        with pytest.raises(ValueError) as e: files.load("folder", tmp_path, size=crop)
        one_line(e, "size from 1 to 4096, crop likewise", "found ")


def test_here_means_that_load_finds_it(tmp_path, monkeypatch):
    "The table looks where `load` looks, and at sizes: no empty folder, no junk, and each way in which the files may lie."
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path)); monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "sk"))
    here = lambda: {r.name for r in files.table() if r.present}
    def write(*names, body=b"x"):
        for name in names: (tmp_path / name).parent.mkdir(parents=True, exist_ok=True); (tmp_path / name).write_bytes(body)
    bins = [f"cifar10/cifar-10-batches-bin/{b}.bin" for b in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")]
    for folder in ("cifar10/cifar-10-batches-bin", "lfw/lfw", "cars3d/cars", "lsun_church/train", "celeba/img_align_celeba"): (tmp_path / folder).mkdir(parents=True)
    write(*(f"mnist/{f}.gz" for f in files.SOURCES["mnist"].files), *(f"svhn/{f}" for f in files.SOURCES["svhn"].files), "celeba/img_align_celeba/1.jpg", *bins[:5]); write("cars3d/cars3d.npz", body=b"")
    assert here() == set()
    for name in files.SOURCES["celeba"].files:
        if name.endswith(".txt"): write(f"celeba/{name}"); os.truncate(tmp_path / "celeba" / name, files.SOURCES["celeba"].files[name].size)
    write("sk/lfw_home/lfw_funneled/Ann_B/Ann_B_0001.jpg", bins[5], "cars3d/cars/car_001_mesh.mat", "lsun_church/church_outdoor_train_lmdb/data.mdb")
    assert here() == {"celeba", "lfw", "cifar10", "cars3d", "lsun_church"}
    for name in files.SOURCES["mnist"].files: os.truncate(tmp_path / f"mnist/{name}.gz", int(files.SOURCES["mnist"].files[name].packed * 1.02))
    assert "mnist" in here()


@pytest.mark.parametrize("call, words", [
    (lambda t: files.load("dsprites", t, "train"), "split 'all'"), (lambda t: files.load("mnist", t, size=64), "no size or crop for mnist"), (lambda t: files.load("celeba", t, size=0), "size from 1 to 4096"),
    (lambda t: files.load("celeba", t, crop="big"), "size from 1"), (lambda t: files.load("celeba", t, crop=(-1, 0, 5)), "size from 1"), (lambda t: files.load("celeba", t, "everything"), "split 'train' or 'valid'")])
def test_bad_arguments(tmp_path, call, words):
    with pytest.raises(ValueError) as e: call(tmp_path)
    one_line(e, words)


@pytest.mark.parametrize("name", [n for n, s in files.SOURCES.items() if n not in ("mnist", "fashion_mnist", "folder")])
def test_nothing_here(tmp_path, monkeypatch, name):
    "`load` fetches no gigabytes by itself: it says what to do, and leaves nothing behind."
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "no"))
    with pytest.raises(Unavailable) as e: files.load(name, tmp_path)
    one_line(e, "expected ", "found none", "put" if files.SOURCES[name].mirrors or name == "celeba" else "fetch_lfw_people")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["celeba", "lfw", "folder"])
def test_get_says_what_to_do_by_hand(tmp_path, monkeypatch, name, capsys):
    from disdiff_tutorial import run
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    with pytest.raises(SystemExit) as e: run.main(["data", "get", name])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("disdiff: expected ") and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_table_names_everything(capsys):
    from disdiff_tutorial import run
    run.main(["data", "list"])
    text = capsys.readouterr().out
    for name, s in files.SOURCES.items():
        assert name in text and s.licence in text and s.address in text and s.citation in text
        for filename, f in s.files.items():
            assert filename in text and (f.sha256 or f.md5) in text and len(f.sha256 or "0" * 64) == 64 and len(f.md5 or "0" * 32) == 32 and (f.sha256 or f.md5)
    assert "only an md5 is known" in text and files.SOURCES["mpi3d_toy"].files["mpi3d_toy.npz"].sha256 is None


@pytest.mark.parametrize("module", ["h5py", "PIL.Image", "lmdb"])
def test_a_library_that_is_not_installed(monkeypatch, module):
    monkeypatch.setattr(files.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError) as e: files.needed(module)
    one_line(e, module.split(".")[0], "disdiff-tutorial[files]")


# --- fuzzing the parsers written by hand: for any bytes a valid result, or a ValueError in one line that names the file ---

def says_why(call, path):
    try: return call()
    except ValueError as err: one_line(err, "expected ", "found ", path.name)


def changed(raw, edits):
    raw = bytearray(raw)
    for at, new, cut in edits: at %= len(raw) + 1; raw[at:at + cut] = new
    return bytes(raw)


@fuzz
@given(raw=st.binary(max_size=100) | st.builds(lambda y, n: bytes([y]) + bytes(3072) * n, st.integers(0, 255), st.integers(0, 2)) | st.integers(0, 9000).map(bytes))
def test_fuzz_cifar(raw):
    got = says_why(lambda: files.parse_cifar(raw, Path("batch.bin")), Path("batch.bin"))
    if got: assert len(got[0]) * 3073 == len(raw) and got[0].shape[1:] == (3, 32, 32) and got[1].max() < 10
    else: assert not raw or len(raw) % 3073 or max(raw[::3073]) > 9


TAR = {"data/cars/a.mat": bytes(range(200)), "list.txt": b"a.mat", "b.mat": b"x" * 700}
def tar_bytes(members):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode="w") as tar:
        for name, kind, link, body in members:
            info = tarfile.TarInfo(name); info.type, info.linkname, info.size = kind, link, len(body) * (kind == tarfile.REGTYPE)
            tar.addfile(info, io.BytesIO(body))
    return f.getvalue()


whole_tar = tar_bytes([(n, tarfile.REGTYPE, "", b) for n, b in TAR.items()])
more_edits = st.lists(st.tuples(st.integers(0, 900), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=5)
tar_edits = st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4), st.integers(0, 4)), min_size=1, max_size=5)


def mats(path): return [(name, f.read()) for name, f in files.tar_members(path, r"\.mat$", limit=1 << 20, most=4096)]


@fuzz
@given(raw=st.binary(max_size=80) | st.builds(changed, st.just(whole_tar), tar_edits).map(gzip.compress) | st.builds(changed, st.just(gzip.compress(whole_tar)), more_edits))
def test_fuzz_tar(tmp_path, raw):
    path = tmp_path / "fuzz.tar.gz"; path.write_bytes(raw)
    for name, body in says_why(lambda: mats(path), path) or []: assert name.endswith(".mat") and not name.startswith("/") and ".." not in name.split("/") and len(body) <= 4096
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


parts = st.lists(st.sampled_from(["", ".", "..", "a", "b.mat", "c.mat"]), min_size=1, max_size=4).map("/".join)
kinds = st.sampled_from([tarfile.REGTYPE] * 4 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])


@fuzz
@given(members=st.lists(st.tuples(parts, kinds, parts, st.binary(max_size=5000)), max_size=4))
def test_fuzz_members_of_a_tar(tmp_path, members):
    "Whatever names, links and devices a whole tar holds: all its plain .mat files, or one line, and that for each that would leave the folder and each that is too large."
    path = tmp_path / "fuzz.tar.gz"; path.write_bytes(gzip.compress(tar_bytes(members)))
    got = says_why(lambda: mats(path), path)
    leaves = lambda name: name.startswith("/") or os.path.normpath(name).startswith("..")
    def refused(name, kind, link, body):
        if kind == tarfile.DIRTYPE: name = name.rstrip("/")                      # as tarfile reads it
        points = {tarfile.SYMTYPE: lambda: link.startswith("/") or leaves(os.path.join(os.path.dirname(name), link)), tarfile.LNKTYPE: lambda: leaves(link)}.get(kind, lambda: False)
        return leaves(name) or points() or kind in (tarfile.CHRTYPE, tarfile.FIFOTYPE) or kind == tarfile.REGTYPE and name.endswith(".mat") and len(body) > 4096
    bad = [m for m in members if refused(*m)]
    assert got is None or not bad
    if all(kind == tarfile.REGTYPE for _, kind, *_ in members) and not bad: assert got == [(name, body) for name, _, _, body in members if name.endswith(".mat")]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


TINY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
def npz_bytes(save): f = io.BytesIO(); save(f, a=TINY, b=TINY.astype("f8")); return f.getvalue()


@fuzz
@given(raw=st.binary(max_size=80) | st.builds(changed, st.sampled_from([npz_bytes(np.savez), npz_bytes(np.savez_compressed)]), more_edits))
def test_fuzz_npz(tmp_path, raw):
    path = tmp_path / "fuzz.npz"; path.write_bytes(raw)
    found = says_why(lambda: files.npz_member(path, "a"), path)
    if not found: return
    assert found.dtype.kind in "buif" and min(found.shape, default=1) > 0
    if found.start is not None: assert found.start + found.dtype.itemsize * int(np.prod(found.shape)) <= len(raw)
    got = says_why(lambda: files.npz_array(path, "a", "u1", (2, 3, 4)), path)
    assert got is None or got.shape == (2, 3, 4)


literal = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=8).map(repr)
headers_npy = st.binary(max_size=60) | st.builds(lambda text: header(text.encode("ascii", "ignore").decode()), literal | st.text(max_size=60)) | st.builds(
    lambda kind, order, shape: header(repr({"descr": kind, "fortran_order": order, "shape": tuple(shape)})), st.sampled_from(["|u1", "<f8", "|O", "<U4", ">i2", "V3", "u1,u1", [("a", "O")]]), st.booleans(), st.lists(st.integers(-2, 2**40), max_size=4))


@fuzz
@given(raw=headers_npy)
def test_fuzz_npy_header(raw):
    got = says_why(lambda: files.npy_header(io.BytesIO(raw), Path("a.npy")), Path("a.npy"))
    if got: assert got[0].kind in "buif" and all(n > 0 for n in got[1])


page = st.builds(lambda magic, version, size, last, txn: bytes(16) + struct.pack("<II16xI92xQQ", magic, version, size, last, txn) + bytes(4096 - 152), st.sampled_from([0xBEEFC0DE, 0]), st.integers(0, 2), st.sampled_from([4096, 0, 65536]),
                 st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))


@fuzz
@given(raw=st.binary(max_size=200) | st.builds(lambda a, b: a + b, page, page))
def test_fuzz_lmdb_head(raw):
    got = says_why(lambda: files.lmdb_head(raw, Path("data.mdb")), Path("data.mdb"))
    assert got is None or got[2] > 0


@fuzz
@given(raw=st.binary(max_size=200) | st.builds(changed, st.just(ATTRIBUTES), more_edits))
def test_fuzz_table(raw):
    got = says_why(lambda: files.parse_table(io.BytesIO(raw), Path("list.txt"), (-1, 1)), Path("list.txt"))
    if got: assert len(got[0]) == len(got[1]) and set(np.unique(got[1])) <= {-1, 1}


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=80) | st.builds(changed, st.sampled_from([JPEGS["000001.jpg"], encoded(FACES[0].resize((20, 20)), "PNG"), encoded(FACES[0].resize((20, 20)), "WEBP")]), more_edits))
def test_fuzz_picture(raw):
    got = says_why(lambda: files.picture(raw, Path("face.jpg"), 8), Path("face.jpg"))
    assert got is None or (got.shape == (8, 8, 3) and got.dtype == np.uint8)


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=300) | st.builds(changed, st.sampled_from([mat(X=TINY, y=TINY[0]), mat(X=TINY)[:128] + bytes(100)]), more_edits))
def test_fuzz_mat(raw):
    got = says_why(lambda: files.mat_array(io.BytesIO(raw), Path("a.mat"), "X", (2, 3, 4)), Path("a.mat"))
    assert got is None or (got.shape == (2, 3, 4) and got.dtype == np.uint8)
