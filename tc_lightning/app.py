"""The mixing page and the rating page (Gradio, extra `app`), on loopback; no logic of its own: see playground and ratings."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tc_lightning import markup
from tc_lightning.loopback import MAX_BODY, Loopback
from tc_lightning.playground import LIMITS, Playground, Trial
from tc_lightning.ratings import ANSWERS, Ratings, read_answers, win_rates
from tc_lightning.sampling import SCHEDULERS

HIDDEN = {"api_visibility": "private"}
# arrow keys answer, Backspace goes back; not while a text is being written, and only where the rating page is to be seen
KEYS = """() => document.addEventListener('keydown', event => {
  const id = {ArrowLeft: 'rate-left', ArrowDown: 'rate-tie', ArrowRight: 'rate-right', Backspace: 'rate-back'}[event.key];
  const button = id && document.getElementById(id);
  if (!button || !button.offsetParent || /INPUT|TEXTAREA|SELECT/.test(event.target.tagName) || event.repeat) return;
  event.preventDefault(); button.click();
})"""
TOKEN = "() => (document.querySelector('[data-token]') || {dataset: {token: ''}}).dataset.token"


def serve(
    folder: Path,
    playground: Playground | None = None,
    ratings: Ratings | None = None,
    port: int | None = None,
    browser: bool = False,
) -> Any:
    """Start the page on 127.0.0.1 and return Gradio's Blocks; `close()` ends it.

    Args:
        folder: of the run; Gradio keeps its temporary files there.
        playground: for the mixing page.
        ratings: for the rating page.
        port: a free one from 7860 on by default.

    Raises:
        ValueError: Gradio is not installed.
        OSError: the port is taken.
    """
    # before Gradio is imported
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "gradio"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the page needs Gradio: pip install 'tc_lightning[app]'") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with gr.Blocks(title="tc_lightning", analytics_enabled=False) as page, gr.Tabs():
        if playground is not None:
            with gr.Tab("Mix", id="mix"):
                _mixing(gr, playground)
        with gr.Tab("Rate", id="rate"):
            _rating(gr, ratings)
    page.queue(default_concurrency_limit=1, max_size=16, api_open=False)
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=browser,
        show_error=True,  # of what nobody expected Gradio shows the message, and the page survives
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_BODY,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [(Loopback, (), {})], "docs_url": None, "redoc_url": None, "openapi_url": None},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=markup.STYLE,
        js=KEYS,
    )
    return page


def _told(work: Callable[..., tuple], *arguments: Any, blank: int) -> tuple:
    """What `work` gives; its error as a message on the page and `blank` outputs left as they are."""
    import gradio as gr

    try:
        return work(*arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        return (markup.message(str(error), "error"), *[gr.skip()] * blank)


def _mixing(gr: Any, playground: Playground) -> None:
    start = playground.first_trial()
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=1, max_lines=4, autofocus=True, submit_btn=False, elem_id="prompt")
            sliders = [
                gr.Slider(0, 1, w, step=0.05, label=name, elem_id=f"weight-{index}")
                for index, (name, w) in enumerate(zip(playground.names, start.weights, strict=True))
            ]
            rest = gr.HTML(_rest(start))
            seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=LIMITS["seed"][1], elem_id="seed")
            with gr.Accordion("Sampling", open=False):
                steps = gr.Slider(*LIMITS["steps"], start.steps, step=1, label="Steps")
                guidance = gr.Slider(*LIMITS["guidance_scale"], start.guidance_scale, step=0.1, label="Guidance scale")
                scheduler = gr.Dropdown(list(SCHEDULERS), value=start.scheduler, label="Scheduler")
                fraction = gr.Slider(
                    *LIMITS["tuned_fraction"], start.tuned_fraction, step=0.05, label="Tuned fraction (t < 1000 x this)"
                )
                space = gr.Radio(["embedding", "weights"], value=start.space, label="Space")
            alone = gr.Checkbox(False, label="Also each text encoder alone")
            live = gr.Checkbox(True, label="Sample when a slider moves")
            go = gr.Button("Make pictures", variant="primary", elem_id="go")
            which = gr.Dropdown(playground.names, value=playground.names[0], label="A strip over one slider")
            strip = gr.Button("Make strip", elem_id="strip")
            name = gr.Textbox(label="Name of this mix", placeholder="my mix", elem_id="mix-name")
            save = gr.Button("Save this mix as an encoder", elem_id="save")
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML(markup.message("Write a prompt and press Enter."), elem_id="status")
            shown = gr.HTML(elem_id="pictures")
            look = {"columns": 8, "height": "auto", "allow_preview": False, "fit_columns": False, "buttons": [], "visible": False}
            history = gr.Gallery(label="History: choose one to go back to it", elem_id="history", **look)
    settings = [prompt, seed, steps, guidance, scheduler, fraction, space, *sliders]
    outputs, results = [status, shown, history], [*settings, rest, status, shown]

    def compare(alone: bool, *values: Any, progress: Any = gr.Progress()) -> tuple:  # noqa: B008  Gradio's way to ask for it
        return _told(_compare, playground, _trial(values), alone, progress, blank=2)

    def only_live(live: bool, alone: bool, *values: Any, progress: Any = gr.Progress()) -> tuple:  # noqa: B008
        written = live and str(values[0]).strip()
        return _told(_compare, playground, _trial(values), alone, progress, blank=2) if written else (gr.skip(),) * 3

    def make_strip(which: str, *values: Any, progress: Any = gr.Progress()) -> tuple:  # noqa: B008
        return _told(_strip, playground, _trial(values), which, progress, blank=1)

    work = {"concurrency_id": "model", "show_progress": "full", "show_progress_on": [shown], **HIDDEN}
    for event in (go.click, prompt.submit, seed.submit):
        event(compare, [alone, *settings], outputs, scroll_to_output=True, **work)
    for slider in sliders:
        slider.change(lambda *weights: _rest(Trial("", weights)), sliders, rest, queue=False, show_progress="hidden", **HIDDEN)
        slider.input(only_live, [live, alone, *settings], outputs, trigger_mode="always_last", **work)
    strip.click(make_strip, [which, *settings], [status, shown], **work)
    save.click(
        lambda name, *values: _told(_save, playground, _trial(values), name, blank=0)[0], [name, *settings], status, **HIDDEN
    )

    def restore(event: Any) -> tuple:
        return _restore(playground, event.index)

    restore.__annotations__["event"] = gr.SelectData  # Gradio hands it to whoever asks by this type
    history.select(restore, None, results, **HIDDEN)


def _trial(values: tuple) -> Trial:
    prompt, seed, steps, guidance_scale, scheduler, tuned_fraction, space, *weights = values
    return Trial(prompt, tuple(weights), seed, steps, guidance_scale, scheduler, tuned_fraction, space)


def _rest(trial: Trial) -> str:
    return f'<p id="rest">original {trial.all_weights[0]:g} (what the others leave to one)</p>'


def _compare(playground: Playground, trial: Trial, alone: bool, progress: Any) -> tuple:
    made = playground.compare(trial, alone, lambda done, what: progress(done, desc=what))
    said = playground.note(trial) or "Scores: under each picture, with the difference from the original's."
    return markup.message(said, "done"), markup.figures(made, trial.prompt, playground.settings(trial)), _history(playground)


def _history(playground: Playground) -> Any:
    import gradio as gr

    thumbnails = [(markup.thumbnail(made[1]), str(number + 1)) for number, (_, made) in enumerate(playground.history)]
    return gr.Gallery(thumbnails, visible=True)


def _strip(playground: Playground, trial: Trial, name: str, progress: Any) -> tuple:
    made = playground.strip(trial, name, lambda done, what: progress(done, desc=what))
    return markup.message(f"{name} from 0 to 1, the others as they are set.", "done"), markup.figures(made, trial.prompt)


def _save(playground: Playground, trial: Trial, name: str) -> tuple:
    folder = playground.save(trial, name)
    said = f"Saved, mixed in weight space, in {folder}. For other tools: python -m tc_lightning export run={folder} out=<folder>"
    return (markup.message(said, "done"),)


def _restore(playground: Playground, number: int) -> tuple:
    trial, made = playground.history[number]
    values = (trial.prompt, trial.seed, trial.steps, trial.guidance_scale, trial.scheduler, trial.tuned_fraction, trial.space)
    said = markup.message(f"Back to number {number + 1}.", "done")
    return (*values, *trial.weights, _rest(trial), said, markup.figures(made, trial.prompt, playground.settings(trial)))


def _rating(gr: Any, ratings: Ratings | None) -> None:
    if ratings is None:
        gr.Markdown(
            "Blind comparison of images that `evaluate` wrote:\n\n"
            "    python -m tc_lightning evaluate run='[a,b]' shown=-1 hydra.run.dir=runs/compared\n"
            "    python -m tc_lightning rate images=runs/compared\n"
        )
        return
    view = gr.HTML(_asked(ratings), elem_id="rate-view")
    with gr.Row():
        buttons = {
            answer: gr.Button(f"{answer.capitalize()} ({arrow})", elem_id=f"rate-{answer}", min_width=90)
            for answer, arrow in zip(ANSWERS, ("←", "↓", "→"), strict=True)
        }
        back = gr.Button("Back (Backspace)", elem_id="rate-back", min_width=90)
    end = gr.Button("Stop here and show the table", elem_id="rate-table")
    token, table = gr.Textbox(visible="hidden"), gr.HTML(elem_id="rates")
    outputs = [view, table]
    for answer, button in buttons.items():
        button.click(partial(_answer, ratings, answer), token, outputs, js=TOKEN, show_progress="hidden", **HIDDEN)
    back.click(lambda: (ratings.back(), _asked(ratings))[1], None, view, show_progress="hidden", **HIDDEN)
    end.click(lambda: _table(ratings), None, table, **HIDDEN)


def _asked(ratings: Ratings) -> str:
    if ratings.current is None:
        return markup.message(f"All {len(ratings.tasks)} questions are answered: thank you.", "done")
    pair, asked = ratings.current
    return markup.question(pair, asked, ratings.token, ratings.position, len(ratings.tasks))


def _answer(ratings: Ratings, answer: str, token: str) -> tuple[str, str]:
    try:
        ratings.answer(token, answer)
    except OSError as error:  # a full disk: nothing is lost that was answered before
        return _asked(ratings), markup.message(f"The answer could not be written: {error}", "error")
    return _asked(ratings), _table(ratings) if ratings.current is None else ""


def _table(ratings: Ratings) -> str:
    return markup.win_table(win_rates(read_answers(ratings.file)))
