"""A real ComfyUI server, its own frontend, and a headless Chromium that uses it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

import other_models
import workflow_inputs
from runner.hosts import PACK, Host
from runner.server import Server

HOST = Host(Path(os.environ["EXVIDEO_HOST"]))
#: Where screenshots are kept, one folder for each host and frontend.
SCREENSHOTS = Path(os.environ.get("EXVIDEO_SCREENSHOTS", PACK / "output" / "screenshots"))
#: Frontends newer than the host's own, one folder for each version, and the oldest ComfyUI that they are tried on.
FRONTENDS = Path.home() / "comfy" / "frontends"
FRONTENDS_HOST = (0, 33)


def frontends() -> list[str | None]:
    """The host's own frontend, which is None, and with `run.py test --all` the versions in FRONTENDS."""
    found: list[str | None] = [None]
    if (
        "EXVIDEO_EVERY_TEST" in os.environ
        and tuple(int(part) for part in HOST.version.split(".")[:2]) >= FRONTENDS_HOST
    ):
        found += sorted(folder.name for folder in FRONTENDS.glob("*") if static(folder.name).is_dir())
    return found


def static(version: str) -> Path:
    """What a server gives browsers of a frontend."""
    return FRONTENDS / version / "comfyui_frontend_package" / "static"


@pytest.fixture(scope="session", params=frontends(), ids=lambda version: f"frontend-{version or 'own'}")
def frontend(request: pytest.FixtureRequest) -> str | None:
    """The version of a frontend; None for the host's own."""
    return request.param


@pytest.fixture(scope="session")
def server(frontend: str | None) -> Iterator[Server]:
    """With previews on, the workflows' inputs, and the small model under the names of the published ones."""
    root = ["--front-end-root", str(static(frontend))] if frontend else []
    with Server(HOST, arguments=["--preview-method", "auto", *root]) as server:
        workflow_inputs.give(server)
        other_models.give_names(server)
        yield server


@pytest.fixture(scope="session")
def browser(server: Server) -> Iterator[Browser]:  # after the server, which cannot start in Playwright's event loop
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["EXVIDEO_CHROMIUM"], args=["--no-sandbox"])
        # A server's first user is greeted by its templates, which lie over the canvas; later ones are not.
        page = browser.new_page()
        App(page, SCREENSHOTS).open(server.url)
        page.close()
        yield browser
        browser.close()


class App:
    """The frontend in a page, by what users see and do."""

    def __init__(self, page: Page, screenshots: Path) -> None:
        self.page = page
        self.screenshots = screenshots
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=90_000)
        self.page.wait_for_timeout(3000)
        self.page.keyboard.press("Escape")  # what greets a new user
        self.page.wait_for_timeout(500)
        self.errors.clear()  # the frontend's own at its start

    def shot(self, name: str) -> None:
        self.screenshots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.screenshots / f"{name}.png")

    def templates(self) -> None:
        """Open the template browser at this pack's workflows."""
        self.page.locator("button[aria-label=Templates]").click()
        dialog = self.page.locator("[role=dialog]").first
        dialog.get_by_text(PACK.name, exact=True).click()
        dialog.get_by_text("exvideo_quickstart", exact=True).wait_for()

    def load_template(self, name: str) -> None:
        self.templates()
        self.page.locator("[role=dialog]").first.get_by_text(name, exact=True).click()
        # The graph before it may have nodes too.
        ours = "window.app.graph._nodes.some(node => node.type.startsWith('ExVideo'))"
        self.page.wait_for_function(ours)
        self.page.locator("[role=dialog]").first.wait_for(state="hidden")
        self.fit()

    def fit(self) -> None:
        """Show the whole graph."""
        self.page.locator("button[aria-label^='Fit View']").click()
        self.page.wait_for_timeout(1000)

    def look(self, left: float, top: float, scale: float) -> None:
        """Show the graph from a place of it on."""
        self.page.evaluate(
            """([left, top, scale]) => {
                const {ds} = window.app.canvas
                ds.scale = scale
                ds.offset[0] = -left
                ds.offset[1] = -top
                window.app.canvas.setDirty(true, true)
            }""",
            [left, top, scale],
        )
        self.page.wait_for_timeout(1000)

    def nodes(self) -> list[str]:
        return self.page.evaluate("window.app.graph._nodes.map(node => node.type)")

    def place(self, kind: str, right: float = 60, down: float = -15) -> tuple[float, float]:
        """Where a node is on the page: its title, unless another place within it is asked for."""
        x, y = self.page.evaluate(
            """([kind, right, down]) => {
                const node = window.app.graph._nodes.find(node => node.type === kind)
                const {canvas, ds} = window.app.canvas, box = canvas.getBoundingClientRect()
                return [box.x + (node.pos[0] + ds.offset[0] + right) * ds.scale,
                        box.y + (node.pos[1] + ds.offset[1] + down) * ds.scale]
            }""",
            [kind, right, down],
        )
        return x, y

    def set(self, kind: str, **widgets: object) -> None:
        """Set widgets of the first node of a kind."""
        self.page.evaluate(
            """([kind, widgets]) => {
                const node = window.app.graph._nodes.find(node => node.type === kind)
                for (const [name, value] of Object.entries(widgets)) {
                    const widget = node.widgets.find(widget => widget.name === name)
                    widget.value = value
                    widget.callback?.(value)
                }
            }""",
            [kind, widgets],
        )

    def value(self, kind: str, widget: str) -> object:
        """What a widget of the first node of a kind is set to."""
        return self.page.evaluate(
            "([kind, name]) => window.app.graph._nodes.find(node => node.type === kind)"
            ".widgets.find(widget => widget.name === name).value",
            [kind, widget],
        )

    def insert(self, blueprint: str) -> int:
        """Find a blueprint by a search on the canvas and put it there; the id of its node."""
        count, ids = (f"window.app.graph._nodes.{what}" for what in ("length", "map(node => node.id)"))
        before = self.page.evaluate(ids)
        for _ in range(6):  # the frontend fetches its blueprints some time after its start
            self.page.mouse.dblclick(900, 450)
            self.page.wait_for_timeout(1000)
            # Before the search has the keyboard, letters are shortcuts: M opens the models.
            if self.page.evaluate("document.activeElement.tagName === 'INPUT'"):
                self.page.keyboard.type(blueprint)
                self.page.wait_for_timeout(2000)
                if self.page.get_by_text(blueprint, exact=True).count():
                    self.page.keyboard.press("Enter")
                    self.page.wait_for_timeout(2000)
            if self.page.evaluate(count) > len(before):
                break
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(2000)
        self.page.mouse.move(700, 300)
        self.page.mouse.click(700, 300)  # until then it hangs on the pointer
        self.page.wait_for_timeout(500)
        (made,) = set(self.page.evaluate(ids)) - set(before)
        return made

    def prompt(self) -> dict[str, dict]:
        """The graph in API format, as the frontend would queue it."""
        return self.page.evaluate("window.app.graphToPrompt().then(made => made.output)")

    def run(self) -> None:
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def help(self, kind: str) -> None:
        """Open the help page of a node."""
        self.page.mouse.click(*self.place(kind))
        self.page.locator("[data-testid=info-button], .selection-toolbox button:nth-child(2)").first.click()

    def drop(self, name: str, content: bytes, kind: str) -> None:
        """Drag a file onto the canvas."""
        self.page.evaluate(
            """([name, bytes, kind]) => {
                const transfer = new DataTransfer()
                transfer.items.add(new File([new Uint8Array(bytes)], name, {type: kind}))
                const canvas = window.app.canvas.canvas, box = canvas.getBoundingClientRect()
                const where = {clientX: box.x + box.width * 0.6, clientY: box.y + box.height * 0.9}
                const event = {dataTransfer: transfer, bubbles: true, cancelable: true, ...where}
                for (const type of ['dragenter', 'dragover', 'drop']) canvas.dispatchEvent(new DragEvent(type, event))
            }""",
            [name, list(content), kind],
        )

    def missing(self) -> list[str]:
        """Nodes that the frontend does not know, or whose choice of a file is not there."""
        return self.page.evaluate(
            "window.app.graph._nodes.filter(n => n.has_errors || !(n.type in LiteGraph.registered_node_types))"
            ".map(n => n.type)"
        )

    def toasts(self) -> list[str]:
        """Messages of errors and warnings that are shown."""
        shown = self.page.locator(".p-toast-message-error, .p-toast-message-warn").all_inner_texts()
        return [re.sub(r"\s+", " ", text) for text in shown]


@pytest.fixture
def app(browser: Browser, server: Server, frontend: str | None) -> Iterator[App]:
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    folder = f"{HOST.version}, frontend {frontend}" if frontend else HOST.version
    app = App(context.new_page(), SCREENSHOTS / folder)
    app.open(server.url)
    yield app
    context.close()
