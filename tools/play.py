"""A page in the browser to play with a model: seeds, classes, image-to-image, inpainting, films.

    python -m tools.play --run_name=landscapes

It fills in the flags of `ddpm.py sample`, and shows the command that makes the same files. What it
asks for is in play_images.py, how it looks in play_page.py.
"""

import importlib.util
import os
import signal
import socket
import tempfile
import time

from machinery import checkpoints, command_line, runs
from machinery.basics import UserError
from tools import play_images

LIMITS = {"port": (1, 65535)}
UPLOAD = "20mb"  # the largest file that a visitor may hand in


def first_run(run_name: str) -> str:
    """The run the page begins with: the one that is named, or one there is."""
    names = checkpoints.run_names()
    if not run_name and names:
        return runs.UNTITLED if runs.UNTITLED in names else names[0]
    return runs.choose(run_name)


def check_address(host: str, port: int) -> None:
    """Refuse an address that is in use, or not on this machine."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
            probe.bind((host, port))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host={host} --port={port} cannot be used: {reason}") from error


def play(run_name: str = "", host: str = "127.0.0.1", port: int = 7860) -> None:
    """Open a page in the browser to play with a model.

        python -m tools.play --run_name=landscapes

    Seeds, classes, image-to-image, inpainting, films, and the command that makes the same files.
    Ctrl-C ends it. Images are written to results/RUN/play/, and nothing outside.

    Args:
        run_name: the run to begin with, a folder in models/; the page offers all of them.
        host: the address to listen on; 127.0.0.1 is for this computer alone, 0.0.0.0 for all that
            reach it.
        port: the number behind the colon in the page's address.

    Raises:
        UserError: a flag, package or checkpoint that does not fit.
    """
    command_line.check_limits(locals(), LIMITS)
    run_name = first_run(run_name)
    if not importlib.util.find_spec("gradio"):
        raise UserError("the page needs Gradio: pip install gradio")
    check_address(host, port)
    play_images.load(run_name)
    with tempfile.TemporaryDirectory() as folder:
        # Gradio reads these when it is imported
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        from tools.play_page import open_page

        # the end of a service or of its terminal is one as by Ctrl-C
        for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
            signal.signal(getattr(signal, name), signal.default_int_handler)
        page = open_page(run_name, server_name=host, server_port=port, max_file_size=UPLOAD)
        print(f"the page is http://{host}:{port}; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(1)
        finally:
            page.close(verbose=False)


def main() -> None:
    command_line.run_command_line("-m tools.play", {"play": play}, LIMITS)


if __name__ == "__main__":
    main()
