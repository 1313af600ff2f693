#!/usr/bin/env python3
"""ExVideo for ComfyUI: try it, test it, measure it.

    python run.py demo                     make a 128-frame video from one image, with ComfyUI if there is one
    python run.py test [--tier NAME ...]   run the tests on the newest ComfyUI found; --all runs every test on every one
    python run.py bench NAME [...]         measure (without a name: list the benchmarks; NAME --help: its options)
    python run.py check FILE               say what a model file is and what the nodes would do with it
    python run.py help                     regenerate the nodes' help pages and README's table after a change of texts

Needs only Python. Dependencies are installed into the user's cache folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from runner import tiers
from runner.environment import UnfitEnvironment, found_python, host_python, own_python
from runner.hosts import PACK, Host, find_hosts, is_host

#: Benchmarks, by name.
BENCHMARKS = {
    "cards": "which sizes fit on which card; with --real, run time and memory on this machine's card",
    "drift": "whether videos of many windows drift",
    "fuzz": "how the loaders handle corrupted files",
    "growth": "run time and memory of a call over the number of frames",
    "length": "videos longer than the trained length",
    "memory": "activation memory of a call, compared with the reference",
    "method": "what post-tuning does to the small model",
    "minute": "memory of a server that makes a one-minute video",
    "patches": "memory of a call with other nodes' patches, compared with the estimate",
    "preview": "run time of animated previews",
    "soak": "hundreds of prompts on one server, with cancellations and errors",
    "speed": "run time of a call, compared with the reference",
    "steps": "quality over calls of the UNet: samplers, schedules, guidance, caches, few steps",
    "work": "operations and bytes of a call on a GPU, compared with the reference",
}
HOSTLESS_BENCHMARKS = ("method",)
#: Benchmarks with plots, which are drawn in an environment that has matplotlib.
DRAWN = ("growth", "memory", "steps")
NO_HOST = "no ComfyUI found. Set COMFYUI_PATH to its folder, or install one: pip install comfy-cli && comfy install"
NONE_USABLE = "none of the ComfyUIs found can run: see the lines above."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("demo", help="make a 128-frame video")
    show.add_argument("--host", type=Path, help="the ComfyUI folder (default: the first one found)")
    show.add_argument("--standalone", action="store_true", help="use diffusers even if there is a ComfyUI")
    show.add_argument("--keep", action="store_true", help="keep the server's folder and its log")
    test = commands.add_parser("test", help="run the tests")
    test.add_argument("--tier", action="append", choices=tiers.TIERS, help="only this tier (can be repeated)")
    test.add_argument("--all", action="store_true", help="every test, on every ComfyUI and frontend found")
    test.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="passed on to pytest")
    bench = commands.add_parser("bench", help="run a benchmark", add_help=False)
    bench.add_argument("name", nargs="?", choices=BENCHMARKS)
    check = commands.add_parser("check", help="say what a model file is and what the nodes would do with it")
    check.add_argument("file", type=Path)
    pages = commands.add_parser("help", help="regenerate the nodes' help pages and README's table")
    pages.add_argument("--pictures", action="store_true", help="also retake the screenshots (needs Chromium)")
    options, rest = parser.parse_known_args()
    if rest and options.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if sys.version_info < (3, 10):  # noqa: UP036 - a clear message for older ones
        print(f"run.py needs Python 3.10 or newer; this is {sys.version.split()[0]}.", file=sys.stderr)
        return 1
    try:
        if options.command == "demo":
            return demo(options.host, options.standalone, options.keep)
        if options.command == "bench":
            return benchmark(options.name, rest)
        if options.command == "check":
            return _python(own_python(), "-m", "runner.check_file", str(options.file.resolve())).returncode
        if options.command == "help":
            return write_help(options.pictures)
        return run_tests(tuple(options.tier or tiers.TIERS), options.pytest, everything=options.all)
    except subprocess.CalledProcessError as error:
        print(f"FAILED: {' '.join(map(str, error.cmd))} ended with {error.returncode}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def demo(folder: Path | None = None, standalone: bool = False, keep: bool = False) -> int:
    if folder is not None and not is_host(folder):
        print(f"{folder} is not a ComfyUI folder: it has no main.py.", file=sys.stderr)
        return 1
    hosts, skipped = usable([Host(folder.resolve())] if folder is not None else find_hosts(), most=1)
    if folder is not None and not hosts:
        return 1
    if standalone or not hosts:
        why = "--standalone" if standalone else _no_host(skipped)
        print(f"Using diffusers instead of ComfyUI ({why}). The model is the same.", flush=True)
        return _python(own_python(), "-m", "runner.demo_standalone").returncode
    host = hosts[0]
    arguments = ["--host", str(host.path), *(["--keep"] if keep else [])]
    # Bytecode, which ComfyUI leaves behind whenever it runs, saves the next start more than a second.
    return _python(host_python(host), "-m", "runner.demo", *arguments, bytecode=True).returncode


def benchmark(name: str | None, arguments: list[str]) -> int:
    if name is None:
        print("\n".join(f"{known:8} {what}" for known, what in BENCHMARKS.items()))
        return 0
    if name in HOSTLESS_BENCHMARKS:
        return _python(own_python(), "-m", f"benchmarks.{name}", *arguments).returncode
    hosts, skipped = usable(find_hosts(), most=1)
    if not hosts:
        print(f"bench {name} needs a ComfyUI: {_no_host(skipped)}", file=sys.stderr)
        return 1
    done = _python(host_python(hosts[0]), "-m", f"benchmarks.{name}", *arguments, host=hosts[0])
    if done.returncode or name not in DRAWN:
        return done.returncode
    return _python(own_python(), "-m", "benchmarks.plots", name).returncode


def usable(hosts: list[Host], most: int | None = None) -> tuple[list[Host], list[str]]:
    """The first `most` ComfyUIs that can be started, and a line, which is also printed, for each before that cannot."""
    fit, lines = [], []
    for host in hosts:
        if len(fit) == most:
            break
        try:
            found_python(host)
        except UnfitEnvironment as error:
            lines.append(f"SKIPPED ComfyUI {host.version} ({host.path}): {error}")
            print(lines[-1], file=sys.stderr, flush=True)
        else:
            fit.append(host)
    return fit, lines


def _no_host(skipped: list[str]) -> str:
    """Why no ComfyUI can be used."""
    return NONE_USABLE if skipped else NO_HOST


def write_help(pictures: bool = False) -> int:
    hosts, skipped = usable(find_hosts(), most=1)
    if not hosts:
        print(f"help reads the nodes' inputs from a ComfyUI: {_no_host(skipped)}", file=sys.stderr)
        return 1
    modules = [*(["runner.help_pictures"] if pictures else []), "runner.help_pages"]
    return max(_python(host_python(hosts[0]), "-m", module, host=hosts[0]).returncode for module in modules)


def run_tests(chosen: tuple[str, ...], pytest: list[str], everything: bool = False) -> int:
    hosts, skipped = usable(find_hosts())
    notes = [*skipped]
    if not everything and len(hosts) > 1:
        older = ", ".join(host.version for host in hosts[1:])
        hosts = hosts[:1]
        notes.append(f"Tested on ComfyUI {hosts[0].version} only. To include {older}: python run.py test --all")
    return tiers.run(chosen, hosts, _no_host(skipped), pytest, everything, notes)


def _python(
    python: Path, *arguments: str, host: Host | None = None, bytecode: bool = False
) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(PACK)}
    if not bytecode:
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    if host is not None:
        environment |= {"EXVIDEO_HOST": str(host.path), "EXVIDEO_CHROMIUM": tiers.chromium() or ""}
    return subprocess.run([python, *arguments], cwd=PACK, env=environment, check=False)


if __name__ == "__main__":
    sys.exit(main())
