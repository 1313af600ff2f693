"""A ComfyUI server with this pack, on a free loopback port, in a temporary folder. Runs in ComfyUI's Python."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp

from .hosts import PACK, Host

if TYPE_CHECKING:
    from .simulated_card.launch import Simulation

Prompt = dict[str, dict[str, Any]]
ProgressCallback = Callable[[str, int, int], None]


class ServerError(RuntimeError):
    """The server did not start or has stopped. The message contains the end of its log."""


@dataclass
class Result:
    """Result of a prompt.

    Attributes:
        status: `success`, `error`, `interrupted`, or `invalid` (rejected before it ran).
        outputs: node id -> its outputs, as in the history.
        error: `node_id`, `node_type`, `exception_type` and `exception_message` of the failed node, or the server's
            response to an invalid prompt.
        previews: number of preview images received.
    """

    status: str
    outputs: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    previews: int = 0


class Server:
    """A context that starts a server, and at its end stops it and deletes its folder.

    Args:
        host: the ComfyUI install to run.
        pack: folder of the pack.
        keep: keep the server's folder.
        arguments: additional command line arguments of ComfyUI.
        prefix: prefix of the name of the server's folder.
        simulation: simulated cards to run on (default: the machine's own devices).
    """

    def __init__(
        self,
        host: Host,
        pack: Path = PACK,
        keep: bool = False,
        arguments: Sequence[str] = (),
        prefix: str = "exvideo-server-",
        simulation: Simulation | None = None,
    ) -> None:
        self.host = host
        self.simulation = simulation
        self.keep = keep
        self._arguments = list(arguments)
        self.base = Path(tempfile.mkdtemp(prefix=prefix))
        self.models = self.base / "models"
        self.input = self.base / "input"
        self.output = self.base / "output"
        for name in ("custom_nodes", "models/checkpoints", "models/exvideo", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        _link(pack, self.base / "custom_nodes" / pack.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = self.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        arguments = ["--listen", "127.0.0.1", "--port", str(self.port)]
        arguments += ["--base-directory", str(self.base), "--disable-auto-launch", "--disable-api-nodes"]
        # By default, the server would open, and possibly migrate, the database of the user's install.
        arguments += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}", *self._arguments]
        command, folder = self._command(arguments)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _command(self, arguments: list[str]) -> tuple[list[str], Path]:
        """Command line and working directory."""
        if self.simulation is not None:
            return self.simulation.command(self.host.path, arguments), PACK
        device = [] if _has_gpu() else ["--cpu"]
        return [sys.executable, "main.py", *device, *arguments], self.host.path

    def log(self) -> str:
        """The server's log so far."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def get(self, path: str) -> Any:
        """Response to a GET request."""
        return self._request("GET", path)[1]

    def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and response of a POST request."""
        return self._request("POST", path, json=body or {})

    def run(
        self,
        prompt: Prompt,
        on_progress: ProgressCallback | None = None,
        timeout: float = 600,
        on_queued: Callable[[str], None] | None = None,
    ) -> Result:
        """Queue a prompt in API format and wait for its result. Several threads may call this at the same time.

        Args:
            prompt: the prompt.
            on_progress: called with node id, step and number of steps.
            timeout: in seconds.
            on_queued: called with the prompt's id.

        Raises:
            TimeoutError: the prompt did not finish in time.
            ServerError: the server has stopped.
        """
        return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress, on_queued), timeout))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel the running prompt, or only the given one if it is running."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else None)

    async def _run(
        self, prompt: Prompt, on_progress: ProgressCallback | None, on_queued: Callable[[str], None] | None
    ) -> Result:
        client = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession(self.url) as session,
            session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket_,
        ):
            async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as response:
                answer = await response.json()
            if response.status != 200:
                return Result("invalid", error=answer)
            prompt_id = answer["prompt_id"]
            if on_queued is not None:
                on_queued(prompt_id)
            previews = 0
            async for message in socket_:
                if message.type != aiohttp.WSMsgType.TEXT:
                    previews += message.type == aiohttp.WSMsgType.BINARY
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event.get("data", {})
                if kind == "progress" and on_progress is not None:
                    on_progress(str(data.get("node")), data["value"], data["max"])
                if data.get("prompt_id") != prompt_id:
                    continue
                if kind == "execution_error":
                    return Result("error", error=data)
                if kind == "execution_interrupted":
                    return Result("interrupted", error=data)
                if kind == "execution_success":
                    return Result("success", await self._outputs(session, prompt_id), previews=previews)
            raise ServerError(f"The server closed the connection:\n{self.log()[-3000:]}")

    async def _outputs(self, session: aiohttp.ClientSession, prompt_id: str) -> dict[str, Any]:
        for _ in range(100):  # the history is updated just after the message
            async with session.get(f"/history/{prompt_id}") as response:
                entry = (await response.json()).get(prompt_id)
            if entry is not None:
                return dict(entry["outputs"])
            await asyncio.sleep(0.05)
        raise ServerError(f"Prompt {prompt_id} is not in the history.")

    def _request(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        async def request() -> tuple[int, Any]:
            async with (
                aiohttp.ClientSession(self.url) as session,
                session.request(method, path, **options) as response,
            ):
                is_json = response.content_type == "application/json"
                return response.status, await (response.json() if is_json else response.text())

        return asyncio.run(request())

    def _wait_until_up(self, seconds: float = 180) -> None:
        assert self.process is not None
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI exited with code {self.process.returncode}:\n{self.log()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except aiohttp.ClientError:
                time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {seconds:.0f} s:\n{self.log()[-3000:]}")

    def _stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.remove()

    def remove(self) -> None:
        """Delete the server's folder, unless it should be kept."""
        if self.keep:
            print(f"The server's folder: {self.base}")
        else:
            shutil.rmtree(self.base, ignore_errors=True)


def _has_gpu() -> bool:
    """Whether PyTorch can compute on a GPU. A Linux without one saves the second that importing PyTorch takes."""
    devices = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # NVIDIA, Jetson, AMD, WSL
    if sys.platform == "linux" and not any(map(os.path.exists, devices)):
        return False
    import torch

    return torch.cuda.is_available()


def _link(target: Path, link: Path) -> None:
    """Link a folder. Uses a junction on Windows, where symbolic links require privileges."""
    if sys.platform == "win32":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)
    else:
        link.symlink_to(target, target_is_directory=True)
