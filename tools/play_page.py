"""The page of tools/play.py in Gradio: its inputs, what it shows, and what a click leads to.

The brush is in play.js and play.html, the looks are in play.css.
"""

import html
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from PIL import Image

import ddpm
from machinery import checkpoints
from machinery.basics import UserError
from tools import play_images
from tools.play_images import (
    FORM,
    as_url,
    explain,
    facts_in,
    facts_of,
    guides_of,
    is_led,
    keep_start,
    load,
    show,
    usual_steps,
)

# the inputs that an action on an image fills in
FILLED = ("seed", "n_img", "label", "steps", "variation")


def asset(kind: str) -> str:
    """The text of play.html, play.js or play.css."""
    return Path(__file__).with_name(f"play.{kind}").read_text()


def choose(outcome: dict, index: int) -> tuple:
    """What is shown of one of the images: which it is, the command that makes it, its file."""
    told = facts_in(outcome, index)
    facts = [f"{name} {told[name]}" for name in ("seed", "label") if name in told]
    about = f"**Image {index + 1}** {', '.join(facts)}"
    command = f"The command that makes this file:\n```bash\n{told['command']}\n```"
    return index, about, command, gr.DownloadButton(value=outcome["paths"][index])


class Page:
    """The page: its inputs, what it shows, and what a click leads to.

    Args:
        run_name: the run it begins with.
    """

    def __init__(self, run_name: str):
        self.form = {}
        self.stopped_at = {}  # by visitor; Gradio's own way to cancel lets the work go on at times
        settings = load(run_name)[0]["settings"]
        manners = {"analytics_enabled": False, "delete_cache": (3600, 86400)}  # seconds
        with gr.Blocks(title="Play with a diffusion model", **manners) as page:
            gr.Markdown("# Play with a diffusion model")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self.lay_out_run(run_name, settings)
                    self.lay_out_tabs()
                with gr.Column(scale=3, min_width=320):
                    self.lay_out_results()
            self.connect()
            # runs that were trained since the start are offered, too
            offer = lambda: gr.Dropdown(checkpoints.run_names())  # noqa: E731
            page.load(offer, None, self.form["run_name"], queue=False, show_progress="hidden")
        self.blocks = page

    def lay_out_run(self, run_name: str, settings: dict) -> None:
        names, form = checkpoints.run_names(), self.form
        classes = settings["classes"]
        form["run_name"] = gr.Dropdown(names, value=run_name, label="Run (a model)")
        self.facts = gr.Markdown(facts_of(run_name))
        how = {"multiselect": True, "visible": bool(classes)}
        form["label"] = gr.Dropdown(classes, label="Classes, in turn", **how)
        how = {"step": 0.1, "visible": is_led(run_name)}
        form["guidance"] = gr.Slider(0, 10, ddpm.GUIDANCE, label="Guidance", **how)
        with gr.Accordion("Sampler, steps, size, autoguidance", open=False):
            form["sampler"] = gr.Dropdown(
                list(ddpm.LIMITS["sampler"]), value="auto", label="Sampler"
            )
            form["steps"] = gr.Number(usual_steps(run_name), label="Steps")
            hint = "as the run was trained"
            form["img_size"] = gr.Textbox("", label="Size (height x width)", placeholder=hint)
            guides = guides_of(run_name)
            form["guide"] = gr.Dropdown(guides, value="", label="Lead away from a weaker run")

    def lay_out_tabs(self) -> None:
        form = self.form
        with gr.Row():
            form["n_img"] = gr.Slider(
                1, play_images.MOST_IMAGES, 4, step=1, label="Images", min_width=140
            )
            form["seed"] = gr.Number(0, label="Seed", min_width=140)
        self.dice = gr.Button("Another seed, by chance", size="sm")
        about = "0: a seed each; 0.2: variations of the seed's image"
        form["variation"] = gr.Slider(0, 1, 0, step=0.01, label="Variation", info=about)
        self.buttons = {}
        with gr.Tabs() as self.tabs:
            with gr.Tab("New", id="images"):
                self.buttons["images"] = gr.Button("Make images", variant="primary")
            with gr.Tab("Picture", id="change"):
                self.upload = gr.File(label="A picture of yours, up to 20 MB", height=120)
                form["init_image"] = gr.State("")
                texts = {kind: asset(kind) for kind in ("html", "js")}
                how = {"html_template": texts["html"], "js_on_load": texts["js"]}
                form["mask"] = gr.HTML("", **how, image="", width=64, height=64)
                about = "0: nothing changes, 1: everything"
                form["strength"] = gr.Slider(
                    0, 1, ddpm.STRENGTH, step=0.01, label="Strength", info=about
                )
                self.buttons["change"] = gr.Button("Change the picture", variant="primary")
            with gr.Tab("Film", id="walk"):
                with gr.Row():
                    form["seed_from"] = gr.Number(3, label="From seed", min_width=100)
                    form["seed_to"] = gr.Number(8, label="To seed", min_width=100)
                form["frames"] = gr.Slider(
                    2, play_images.MOST_FRAMES, 24, step=1, label="Images of the film"
                )
                self.buttons["walk"] = gr.Button("Make the film", variant="primary")

    def lay_out_results(self) -> None:
        self.live = gr.HTML(show("Choose a seed and press Make images."))
        self.stop = gr.Button("Stop", size="sm")
        self.outcome = gr.State()
        self.asked_at = gr.State(0.0)
        self.index = gr.State(0)
        self.kind = gr.State("images")
        how = {"columns": 4, "height": "auto", "object_fit": "contain", "allow_preview": False}
        self.gallery = gr.Gallery(
            show_label=False, interactive=False, buttons=[], elem_classes="shelf", **how
        )
        with gr.Column(visible=False) as self.chosen:
            self.about = gr.Markdown()
            self.actions = {}
            with gr.Row():
                for name in ("Variations", "More steps", "Change it", "Repaint a part"):
                    self.actions[name] = gr.Button(name, size="sm", min_width=110)
                self.png = gr.DownloadButton("Download PNG", size="sm", min_width=110)
                self.film = gr.DownloadButton("Download the film", size="sm", min_width=110)
            self.command = gr.Markdown(elem_classes="command")

    # what a click does

    def make(self, request: gr.Request, asked_at: float, kind: str, *values) -> Iterator[tuple]:
        """After every step, what to show; see the outputs in `connect`."""

        def is_stopped() -> bool:
            return self.stopped_at.get(request.session_hash, 0) > asked_at

        form = dict(zip(FORM, values, strict=True))
        for live, outcome in play_images.make(kind, form, is_stopped):
            if outcome is None:
                yield live, *[gr.skip()] * (len(self.outputs) - 1)
            else:
                gallery = gr.Gallery(outcome["paths"], selected_index=0)
                film = gr.DownloadButton(value=outcome["film"] or None, visible=kind == "walk")
                yield live, gallery, outcome, gr.Column(visible=True), film, *choose(outcome, 0)

    def show_run(self, run_name: str) -> tuple:
        """A run's facts, and inputs as they suit it; see the outputs in `connect`."""
        try:
            facts = facts_of(run_name)
        except UserError as error:
            return f"**{html.escape(str(error))}**", *[gr.skip()] * 6
        settings = load(run_name)[0]["settings"]
        classes = list(settings["classes"])
        label = gr.Dropdown(choices=classes, value=[], visible=bool(classes))
        guidance = gr.Slider(value=ddpm.GUIDANCE, visible=is_led(run_name))
        guide = gr.Dropdown(choices=guides_of(run_name), value="")
        return facts, label, guidance, usual_steps(run_name), "", guide, gr.Column(visible=False)

    def show_guidance(self, run_name: str, guide: str) -> gr.Slider:
        """It counts where there are classes or a guide; hidden, it is the usual."""
        if guide or is_led(run_name):
            return gr.Slider(visible=True)
        return gr.Slider(value=ddpm.GUIDANCE, visible=False)

    def take(self, path: str, run_name: str, img_size: str, strength: float) -> tuple:
        """A picture for the painter, read by our reader."""
        if not path:
            return gr.skip(), gr.HTML(value="", image=""), "", *[gr.skip()] * 3
        try:
            kept = keep_start(run_name, path, img_size)
        except (UserError, OSError) as error:
            return show(explain(error), "alert"), *[gr.skip()] * 5
        with Image.open(kept) as picture:
            size = {"width": picture.width, "height": picture.height}
        painter = gr.HTML(value="", image=as_url(kept.read_bytes()), **size)
        said = show("Now press Change the picture; paint first, if only a part may change.")
        return said, painter, str(kept), strength, 0, gr.Tabs(selected="change")

    def note_stop(self, request: gr.Request) -> str:
        self.stopped_at[request.session_hash] = time.monotonic()
        return show("Stopped.")

    def change(self, action: str, outcome: dict, index: int) -> tuple:
        """What an action on an image fills in: the button it stands for, and FILLED."""
        try:
            new = play_images.changed(action, outcome, index)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return outcome["kind"], *(new.get(name, gr.skip()) for name in FILLED)

    def take_image(self, outcome: dict, index: int, *how) -> tuple:
        return self.take(outcome["paths"][index], *how)

    def select(self, outcome: dict, event: gr.SelectData) -> tuple:
        return choose(outcome, event.index)

    def connect(self) -> None:
        """Tie clicks to what they do. Whatever needs the model waits for its turn."""
        form = self.form
        view = [self.index, self.about, self.command, self.png]
        self.outputs = [self.live, self.gallery, self.outcome, self.chosen, self.film, *view]
        hidden = {"show_progress": "hidden", "api_visibility": "private"}
        now = hidden | {"queue": False}
        queued = hidden | {"concurrency_id": "model", "concurrency_limit": 1}

        def make_after(event, kind: gr.State) -> None:
            waiting = event(play_images.wait, None, [self.live, self.asked_at], **now)
            inputs = [self.asked_at, kind, *(form[name] for name in FORM)]
            waiting.then(self.make, inputs, self.outputs, **queued)

        for kind, button in self.buttons.items():
            make_after(button.click, gr.State(kind))
        filled = [self.kind, *(form[name] for name in FILLED)]
        for action in ("Variations", "More steps"):
            inputs = [gr.State(action), self.outcome, self.index]
            click = self.actions[action].click(self.change, inputs, filled, **now)
            make_after(click.success, self.kind)

        start = [self.live, form["mask"], form["init_image"], form["strength"]]
        start += [form["variation"], self.tabs]
        how = [form["run_name"], form["img_size"]]
        for event in (self.upload.upload, self.upload.clear):
            event(self.take, [self.upload, *how, form["strength"]], start, **queued)
        for action, strength in (("Change it", ddpm.STRENGTH), ("Repaint a part", 1.0)):
            inputs = [self.outcome, self.index, *how, gr.State(strength)]
            self.actions[action].click(self.take_image, inputs, start, **queued)

        self.stop.click(self.note_stop, None, self.live, **now)
        self.dice.click(lambda: secrets.randbelow(10**6), None, form["seed"], **now)
        self.gallery.select(self.select, self.outcome, view, **now)
        shown = [self.facts, form["label"], form["guidance"], form["steps"], form["img_size"]]
        shown += [form["guide"], self.chosen]
        form["run_name"].input(self.show_run, form["run_name"], shown, **queued)
        inputs = [form["run_name"], form["guide"]]
        form["guide"].input(self.show_guidance, inputs, form["guidance"], **queued)


def open_page(run_name: str, **where) -> gr.Blocks:
    """The page, served by threads of this process: for `where`, see Gradio's `launch`."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    looks = {"theme": gr.themes.Default(**fonts), "css": asset("css")}  # fonts of this computer
    closed = {"share": False, "ssr_mode": False, "enable_monitoring": False, "footer_links": []}
    blocks = Page(run_name).blocks
    blocks.launch(prevent_thread_lock=True, quiet=True, inbrowser=False, **where, **looks, **closed)
    return blocks
