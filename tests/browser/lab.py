"A JupyterLab on this machine that knows no settings of this user, and its notebooks run from the browser."
import os, secrets, socket, subprocess, time
from contextlib import contextmanager
from urllib.request import urlopen

TOKEN = secrets.token_hex(16)
SETTINGS = {"notebook-extension/tracker": '{"windowingMode": "none"}', "apputils-extension/notification": '{"fetchNews": "false"}'}     # every cell is in the page, seen or not; no news

def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]

@contextmanager
def serve(work, home, python, **env):
    "JupyterLab of the environment of `python` in the folder `work`, its own files in `home`; yields a function from a notebook's path in `work` to its address."
    for name, text in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True); path.write_text(text)
    own = {f"JUPYTER{k}": str(home / v) for k, v in dict(_CONFIG_DIR="config", _RUNTIME_DIR="runtime", _DATA_DIR="data", LAB_SETTINGS_DIR="settings", LAB_WORKSPACES_DIR="spaces").items()}
    port = free_port()
    words = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen([python, "-m", "jupyterlab", *words] + ["--allow-root"] * (getattr(os, "geteuid", lambda: 1)() == 0), stdout=log, stderr=log, env=os.environ | own | dict(IPYTHONDIR=str(home / "ipython")) | env)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(500):
            try: urlopen(f"{address}/api/status?token={TOKEN}", timeout=2).close(); break
            except OSError: time.sleep(.2); assert server.poll() is None, (home / "log").read_text()
        yield lambda path: f"{address}/lab/tree/{path}?token={TOKEN}"
    finally:
        server.terminate(); server.wait(20)

def open_notebook(page, address):
    "Open the notebook and wait for its kernel."
    page.set_viewport_size({"width": 1300, "height": 900})
    page.goto(address)
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'")

def run_all(page):
    "Start all cells, without waiting for them."
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells'), null")
