"data.files: the idx parser, checksums, downloads from a local server, and the fallback; the whole real MNIST where it is found."
import errno, gzip, hashlib, http.server, os, struct, sys, threading
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from disdiff_tutorial import core
from disdiff_tutorial.data import files
from disdiff_tutorial.data.files import File, Unavailable, read_idx

MNIST = next((p for p in (Path(__file__).parents[2] / "shared/data/mnist", core.data_dir() / "mnist")
              if all(files.find(f, p) for f in files.SOURCES["mnist"].files)), None)
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


@real
def test_real_mnist_from_a_mirror(tmp_path, monkeypatch):
    "The true files through the true code: only the address of the mirror differs."
    if not all((MNIST / f"{f}.gz").is_file() for f in files.SOURCES["mnist"].files): pytest.skip("the files are here, but not gzipped")
    monkeypatch.setenv("DISDIFF_MNIST_MIRROR", MNIST.resolve().as_uri())
    paths = files.get("mnist", tmp_path)
    assert [p.name for p in paths] == [f"{f}.gz" for f in files.SOURCES["mnist"].files]
    assert files.load("mnist", tmp_path, "test").labels.bincount().tolist() == COUNTS["test"]


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


class Mirror(http.server.BaseHTTPRequestHandler):
    "Serves `replies[file]`: the bytes, the length announced (None: not announced), the status; notes what was asked."
    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        self.server.asked.append(self.path)
        body, length, status = self.server.replies.get(name, (b"gone", 4, 404))
        self.send_response(status)
        if length is not None: self.send_header("Content-Length", str(length))
        self.end_headers(); self.wfile.write(body)
    def log_message(self, *words): pass


@pytest.fixture
def mirror(monkeypatch):
    "A mirror that behaves; a test bends `replies`. The data set `mnist` is a small one meanwhile."
    monkeypatch.setenv("no_proxy", "127.0.0.1"); monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.asked, server.replies = [], {name: (body, len(body), 200) for name, body in PACKED.items()}
        server.url = f"http://127.0.0.1:{server.server_port}/some/folder"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}); thread.start()
        table = {name: File(len(PACKED[f"{name}.gz"]), len(c), hashlib.sha256(c).hexdigest()) for name, c in CONTENTS.items()}
        monkeypatch.setitem(files.SOURCES, "mnist", files.SOURCES["mnist"]._replace(files=table, mirrors=("http://127.0.0.1:9/a", "http://127.0.0.1:9/b")))
        monkeypatch.setenv("DISDIFF_MNIST_MIRROR", server.url)
        yield server
        server.shutdown(); thread.join()


def test_download(tmp_path, mirror, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)             # somebody watches
    s = files.load("mnist", tmp_path / "new" / "mnist")
    assert np.array_equal(s.images[:, 0].numpy(), IMAGES) and s.labels.tolist() == LABELS.tolist()
    bar = capfd.readouterr().out
    assert "train-images-idx3-ubyte.gz: 100%" in bar and "train-labels-idx1-ubyte.gz: 100%" in bar
    assert sorted(p.name for p in (tmp_path / "new" / "mnist").iterdir()) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert (tmp_path / "new" / "mnist" / "train-labels-idx1-ubyte.gz").read_bytes() == PACKED["train-labels-idx1-ubyte.gz"]
    files.load("mnist", tmp_path / "new" / "mnist")
    assert len(mirror.asked) == 2 and capfd.readouterr().out == ""  # the second time nobody is asked


def test_get_fetches_what_is_missing_and_checks_all(tmp_path, mirror):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(CONTENTS["train-images-idx3-ubyte"])
    paths = files.get("mnist", str(tmp_path))
    assert [p.name for p in paths] == ["train-images-idx3-ubyte"] + [f"{n}.gz" for n in list(CONTENTS)[1:]] and len(mirror.asked) == 3
    paths[3].write_bytes(b"?")
    with pytest.raises(ValueError) as e: files.get("mnist", tmp_path)
    one_line(e, "t10k-labels-idx1-ubyte.gz", "delete it and load again")
    assert paths[3].read_bytes() == b"?" and len(mirror.asked) == 3


def test_default_folder_and_table(tmp_path, mirror, monkeypatch):
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    row = files.table()[0]
    assert row[:2] == ("mnist", 70_000) and not row.present and row.licence and row.address.startswith("http")
    files.get("mnist")
    assert files.table()[0].present and (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").is_file()
    assert files.load("mnist").images.shape == (40, 1, 28, 28)


def test_table_of_the_true_set():
    assert round(files.table()[0].megabytes, 1) == 11.6


def test_length_not_announced(tmp_path, mirror):
    mirror.replies = {name: (body, None, 200) for name, body in PACKED.items()}
    assert len(files.load("mnist", tmp_path).labels) == 40


def test_next_mirror_is_tried(tmp_path, mirror, monkeypatch):
    monkeypatch.delenv("DISDIFF_MNIST_MIRROR")
    monkeypatch.setitem(files.SOURCES, "mnist", files.SOURCES["mnist"]._replace(mirrors=("http://127.0.0.1:9", "nonsense", mirror.url + "/")))
    assert len(files.load("mnist", tmp_path).labels) == 40
    assert mirror.asked == ["/some/folder/train-images-idx3-ubyte.gz", "/some/folder/train-labels-idx1-ubyte.gz"]


NAME = "train-images-idx3-ubyte.gz"
body, other = PACKED[NAME], bytearray(CONTENTS["train-images-idx3-ubyte"]); other[500] ^= 1
REPLIES = {  # name: (body, announced length, status), words of the message
    "killed mid-stream": ((body[:5000], len(body), 200), "broke off after 5,000 of"),
    "killed, no length": ((body[:5000], None, 200), "damaged"), "killed at once": ((b"", len(body), 200), "broke off after 0"),
    "empty": ((b"", 0, 200), "damaged"), "404": ((b"gone", 4, 404), "404"), "500": ((b"", 0, 500), "500"), "bad length": ((body, "many", 200), "many"),
    "tampered": ((gzip.compress(bytes(other)), len(gzip.compress(bytes(other))), 200), "not the original"),
    "flipped byte": ((body[:900] + bytes([body[900] ^ 1]) + body[901:], len(body), 200), "damaged"),
    "truncated gz": ((body[:-20], len(body) - 20, 200), "damaged"), "a web page": ((b"<html>log in</html>", 19, 200), "damaged"),
    "another file": ((PACKED["t10k-images-idx3-ubyte.gz"], None, 200), "not the original"),
    "bomb": ((gzip.compress(CONTENTS["train-images-idx3-ubyte"] + bytes(1 << 23)), None, 200), "damaged"),
    "too large": ((bytes(10 * len(body)), None, 200), "more than")}


@pytest.mark.parametrize("case", REPLIES)
def test_mirror_misbehaves(tmp_path, mirror, case):
    mirror.replies[NAME], words = REPLIES[case]
    with pytest.raises(Unavailable) as e: files.load("mnist", tmp_path)
    one_line(e, words, mirror.url, NAME, "by hand", "DISDIFF_MNIST_MIRROR")
    assert list(tmp_path.iterdir()) == []  # no part of it, no temporary file


def test_limit_holds_without_a_progress_bar(tmp_path, mirror):
    mirror.replies[NAME] = REPLIES["too large"][0]
    with pytest.raises(Unavailable, match="more than"): files.load("mnist", tmp_path)


@pytest.mark.parametrize("answer", [b"220 this is no web server\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"])
def test_mirror_that_is_no_web_server_or_breaks_off_in_a_chunk(mirror, answer):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as odd:
        def reply():
            with odd.accept()[0] as call: call.recv(1000); call.sendall(answer)
        thread = threading.Thread(target=reply); thread.start()
        with pytest.raises(files.Failed) as e: list(files.stream(f"http://127.0.0.1:{odd.getsockname()[1]}/x", 100))
        thread.join()
    one_line(e)


def test_mirror_that_hangs(mirror):
    "A server that takes the call and never answers costs the timeout, not the afternoon."
    import socket
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(files.Failed) as e: list(files.stream(f"http://127.0.0.1:{silent.getsockname()[1]}/x", 100, timeout=0.2))
    one_line(e, "timed out")


def test_no_network(tmp_path, mirror, monkeypatch):
    monkeypatch.delenv("DISDIFF_MNIST_MIRROR")
    with pytest.raises(Unavailable) as e: files.load("mnist", tmp_path)
    one_line(e, "127.0.0.1:9/a (", "127.0.0.1:9/b (", "refused", NAME)
    with pytest.raises(Unavailable): files.get("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fallback(tmp_path, mirror, monkeypatch, capfd):
    monkeypatch.setenv("DISDIFF_DATA", str(tmp_path))
    assert files.mnist_or_digits("test").name == "mnist"
    monkeypatch.setenv("DISDIFF_MNIST_MIRROR", "http://127.0.0.1:9"); capfd.readouterr()
    s = files.mnist_or_digits()
    said = capfd.readouterr().out
    assert s.name == "digits" and said.count("\n") == 1 and "MNIST" in said and "digits" in said
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(b"?")
    with pytest.raises(ValueError): files.mnist_or_digits("test")  # a damaged file is not a missing one


def test_disk_full_while_writing(tmp_path, mirror, monkeypatch):
    "The temporary file is /dev/full: the system's own error, at the write."
    if not Path("/dev/full").exists(): pytest.skip("no /dev/full on this system")
    def mkstemp(dir, prefix, suffix):
        Path(dir, prefix + suffix).symlink_to("/dev/full")
        return os.open(os.devnull, os.O_RDWR), str(Path(dir, prefix + suffix))
    monkeypatch.setattr(core.tempfile, "mkstemp", mkstemp)
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path)
    one_line(e, NAME, "No space left on device", "free space")
    assert not isinstance(e.value, Unavailable) and e.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == [] and len(mirror.asked) == 1  # another mirror would not help


def test_disk_full_at_the_rename(tmp_path, mirror, monkeypatch):
    def replace(*paths): raise OSError(28, "No space left on device")
    monkeypatch.setattr(core.os, "replace", replace)
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path)
    one_line(e, NAME, "No space left on device"); assert not isinstance(e.value, Unavailable)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path, mirror, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path / "file" / "mnist")
    one_line(e, "choose a writable folder"); assert not isinstance(e.value, Unavailable)
    def mkstemp(**_): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(core.tempfile, "mkstemp", mkstemp)
    with pytest.raises(OSError) as e: files.load("mnist", tmp_path)
    one_line(e, "Permission denied", "choose a writable folder")


def test_interrupt_leaves_nothing(tmp_path, mirror, monkeypatch):
    def stream(*_, **__):
        yield b"part"
        raise KeyboardInterrupt
    monkeypatch.setattr(files, "stream", stream)
    with pytest.raises(KeyboardInterrupt): files.load("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once(tmp_path, mirror):
    done = []
    threads = [threading.Thread(target=lambda: done.append(files.load("mnist", tmp_path).images.sum().item())) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert done == [int(IMAGES.sum(dtype=np.int64))] * 4 and len(list(tmp_path.iterdir())) == 2


# --- arguments, and the small digits ------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [lambda: files.load("minst"), lambda: files.get("minst"), lambda: files.load("")])
def test_unknown_set(call):
    with pytest.raises(ValueError) as e: call()
    one_line(e, "expected a data set among mnist")


@pytest.mark.parametrize("call", [lambda: files.load("mnist", split="valid"), lambda: files.digits("valid"), lambda: files.mnist_or_digits(None)])
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
