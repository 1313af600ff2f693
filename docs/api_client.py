#!/usr/bin/env python3
"""Runs a workflow in a ComfyUI that is already running, shows its progress, and fetches what it made.

    python docs/api_client.py workflows/api/exvideo_image_to_video.json --image picture.png \\
        --set ExVideoConditioning.frames=64 --set KSampler.seed=7 --to .

Ctrl-C cancels the run. Needs Python 3.10 and aiohttp, and nothing of this pack: copy it, and change what you need.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import aiohttp

#: Seconds without a message after which the server is asked whether it still knows the run.
_PATIENCE = 2.0


class RunFailed(Exception):
    """The server refused the workflow, or a node failed; the message says which and why."""


def change(prompt: dict[str, Any], setting: str) -> None:
    """Set an input of every node of a class: `Class.input=value`, the value as JSON, or else as text."""
    target, _, text = setting.partition("=")
    kind, _, name = target.partition(".")
    nodes = [node for node in prompt.values() if node["class_type"] == kind]
    if not nodes or not all(name in node["inputs"] for node in nodes):
        raise RunFailed(f"No node of this workflow is called {kind} and has an input {name}.")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    for node in nodes:
        node["inputs"][name] = value


async def upload(session: aiohttp.ClientSession, picture: Path) -> str:
    """The picture's name in the server's input folder."""
    form = aiohttp.FormData()
    form.add_field("image", picture.read_bytes(), filename=picture.name)
    async with session.post("/upload/image", data=form) as response:
        response.raise_for_status()
        return (await response.json())["name"]


async def run(session: aiohttp.ClientSession, prompt: dict[str, Any]) -> dict[str, Any]:
    """Queue a prompt and follow it to its end; what its nodes put out, by node id."""
    client = uuid.uuid4().hex
    # The socket comes first: else a short run could be over before anybody listens.
    async with session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) as socket:
        async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as response:
            answer = await response.json()
        if response.status != 200:
            raise RunFailed(_refusal(answer))
        prompt_id = answer["prompt_id"]
        try:
            await _follow(session, socket, prompt, prompt_id)
        except asyncio.CancelledError:
            # Out of the queue if it waits there, and interrupted if it runs. The id spares other users' runs.
            await session.post("/queue", json={"delete": [prompt_id]})
            await session.post("/interrupt", json={"prompt_id": prompt_id})
            raise
    while True:  # the history is written just after the last message
        async with session.get(f"/history/{prompt_id}") as response:
            entry = (await response.json()).get(prompt_id)
        if entry is not None:
            return entry["outputs"]
        await asyncio.sleep(0.1)


async def _follow(
    session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, prompt: dict[str, Any], prompt_id: str
) -> None:
    while True:
        try:
            message = await socket.receive(timeout=_PATIENCE)
        except asyncio.TimeoutError:
            # Of a prompt that somebody deletes from the queue, no message tells.
            if not await _is_known(session, prompt_id):
                raise RunFailed("The run was deleted from the queue.") from None
            continue
        if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED,
                            aiohttp.WSMsgType.ERROR):  # fmt: skip
            raise RunFailed("The server closed the connection.")
        if message.type != aiohttp.WSMsgType.TEXT:
            continue  # previews come as binary messages
        event = json.loads(message.data)
        data = event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        match event["type"]:
            case "progress":
                kind = prompt.get(str(data["node"]), {}).get("class_type", data["node"])
                print(f"\r{kind}: {data['value']}/{data['max']}   ", end="", file=sys.stderr, flush=True)
            case "execution_error":
                raise RunFailed(f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}")
            case "execution_interrupted":
                raise RunFailed("The run was interrupted.")
            case "execution_success":
                return


async def _is_known(session: aiohttp.ClientSession, prompt_id: str) -> bool:
    """Whether a prompt waits, runs or has run."""
    async with session.get("/queue") as response:
        queue = await response.json()
    if any(entry[1] == prompt_id for part in queue.values() for entry in part):
        return True
    async with session.get(f"/history/{prompt_id}") as response:
        return prompt_id in await response.json()


def _refusal(answer: dict[str, Any]) -> str:
    lines = [answer.get("error", {}).get("message", "The server refused the workflow.")]
    for node, found in answer.get("node_errors", {}).items():
        lines += [f"{found['class_type']} (node {node}): {error['message']}: {error['details']}"
                  for error in found["errors"]]  # fmt: skip
    return "\n".join(lines)


async def fetch(session: aiohttp.ClientSession, outputs: dict[str, Any], folder: Path) -> list[Path]:
    """Every file that nodes have saved, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    entries = [entry for output in outputs.values() for part in output.values() if isinstance(part, list)
               for entry in part if isinstance(entry, dict) and entry.get("type") == "output"]  # fmt: skip
    for entry in entries:
        query = {name: entry.get(name, "") for name in ("filename", "subfolder", "type")}
        async with session.get("/view", params=query) as response:
            response.raise_for_status()
            found.append(folder / Path(entry["filename"]).name)
            found[-1].write_bytes(await response.read())
    return found


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="in API format")
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--image", type=Path, help="uploaded, and given to LoadImage")
    parser.add_argument("--set", action="append", default=[], metavar="CLASS.INPUT=VALUE")
    parser.add_argument("--to", type=Path, default=Path("."), help="folder for what is made")
    options = parser.parse_args()
    prompt = json.loads(options.workflow.read_text(encoding="utf-8"))
    try:
        async with aiohttp.ClientSession(options.server) as session:
            if options.image is not None:
                change(prompt, f"LoadImage.image={json.dumps(await upload(session, options.image))}")
            for setting in options.set:
                change(prompt, setting)
            outputs = await run(session, prompt)
            print(file=sys.stderr)
            for path in await fetch(session, outputs, options.to):
                print(path)
    except (RunFailed, aiohttp.ClientError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        print("\nCancelled.", file=sys.stderr)
        sys.exit(130)
