"""Verb app: the mixing page, with the rating page where images are named."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig

from tc_lightning.app import serve
from tc_lightning.backbone import shipped
from tc_lightning.cli import build, record
from tc_lightning.cli.generate import STABLE_DIFFUSION, _device
from tc_lightning.cli.mix import _names, load_tuned
from tc_lightning.playground import Playground
from tc_lightning.ratings import Ratings, markdown, read_answers, read_pairs, win_rates


def run(cfg: DictConfig) -> Path:
    """Serve until Ctrl-C; returns the run folder."""
    build.quiet()
    folder = Path(HydraConfig.get().runtime.output_dir)
    ratings = open_ratings(cfg, folder) if cfg.images is not None else None
    playground = build_playground(cfg, folder)
    serve_until_stopped(cfg, folder, playground, ratings)
    return folder


def build_playground(cfg: DictConfig, folder: Path) -> Playground:
    """The models and rewards of the settings."""
    runs = [str(run) for run in (cfg.run if isinstance(cfg.run, ListConfig) else [cfg.run])] if cfg.run is not None else shipped()
    names, device = _names(cfg, runs), _device(cfg.device)
    backbone, tuned, chain = load_tuned(runs, names, cfg.base, device)
    chain |= {name: cfg.chain[name] for name in STABLE_DIFFUSION if cfg.chain[name] is not None}
    chain |= {"tuned_fraction": cfg.tuned_fraction} if cfg.tuned_fraction is not None else {}
    rewards = build.mix_of(cfg.get("reward"), "reward")
    about = {"git": record.git_commit(), "versions": record.versions()}
    sources = [run if not Path(run).exists() else str(Path(run).resolve()) for run in runs]
    return Playground(backbone, tuned, folder, rewards.to(device) if rewards else None, chain, sources, cfg.base, about)


def open_ratings(cfg: DictConfig, folder: Path) -> Ratings:
    """The pairs of an evaluation, and the answers that the run folder has already."""
    return Ratings(read_pairs(str(cfg.images), str(cfg.rater), cfg.limit), folder / "ratings.csv", str(cfg.rater))


def serve_until_stopped(cfg: DictConfig, folder: Path, playground: Playground | None, ratings: Ratings | None) -> None:
    """Open the page, wait for Ctrl-C, then print what there is."""
    page = serve(folder, playground, ratings, cfg.port, cfg.browser)
    record.console.print(f"page        {page.local_url} (this machine only; Ctrl-C ends it)\nrun folder  {folder}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        record.console.print("")
    finally:
        page.close(verbose=False)
    say_results(folder, playground, ratings)


def say_results(folder: Path, playground: Playground | None, ratings: Ratings | None) -> None:
    """The table of win rates, written and printed; where pictures and encoders are, and the next command."""
    rates = win_rates(read_answers(ratings.file)) if ratings is not None else []
    if rates:
        (folder / "ratings.md").write_text(markdown(rates), encoding="utf-8")
        table = record.Table("model", "question", "win rate, 95 %", "wins / ties / losses")
        for row in rates:
            rate: Any = f"{row.rate.mean:.1%} [{row.rate.low:.1%}, {row.rate.high:.1%}]"
            table.add_row(f"{row.model} against {row.base}", row.question, rate, f"{row.wins} / {row.ties} / {row.losses}")
        record.console.print(table)
        record.console.print(f"answers     {ratings.file}\ntable       {folder / 'ratings.md'}")
    if playground is not None and playground.history:
        record.console.print(f"history     {folder / 'history.jsonl'}\npictures    {folder / 'pictures'}")
    saved = sorted((folder / "encoders").glob("*/run.json"))
    example = saved[0].parent if saved else "<run folder>"
    record.console.print(f"next        python -m tc_lightning export run={example} out=<folder>", markup=False)
