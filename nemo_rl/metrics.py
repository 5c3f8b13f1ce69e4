"""What a run leaves behind: metrics.jsonl, TensorBoard scalars, a progress bar, a table and a picture."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

log = logging.getLogger(__name__)
Row = Mapping[str, Any]


def make_run_folder(log_dir: Path, run_name: str | None, stem: str) -> Path:
    """Create `<log_dir>/<run_name>` and point `<log_dir>/latest` at it.

    Without a name, the run is called after `stem` and the time. Raises FileExistsError where a named run exists.
    """
    name = run_name or f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, suffix = log_dir / name, 1
    while run_name is None and folder.exists():
        suffix += 1
        folder = log_dir / f"{name}-{suffix}"
    folder.mkdir(parents=True)
    link, temporary = log_dir / "latest", log_dir / f".latest-{os.getpid()}"
    temporary.symlink_to(folder.name)
    os.replace(temporary, link)
    return folder


def start_logging(folder: Path, level: str, console: Console) -> None:
    """Log to `<folder>/run.log` in full, and warnings to the console."""
    root = logging.getLogger()
    root.setLevel(level)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    file = logging.FileHandler(folder / "run.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = RichHandler(logging.WARNING, console, show_path=False, show_time=False)
    root.addHandler(file)
    root.addHandler(terminal)


def mean_of(rows: Sequence[Row], name: str) -> float:
    """Mean of the rows that have `name`; NaN where none has."""
    values = [float(r[name]) for r in rows if r.get(name) is not None]
    return sum(values) / len(values) if values else math.nan


def reward_margin(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean reward of the first fifth of the steps and of the last fifth, each at least one step.

    Raises:
        ValueError: there is no step.
    """
    if not rows:
        raise ValueError("a run without steps has no reward margin")
    fifth = max(len(rows) // 5, 1)
    return mean_of(rows[:fifth], "reward_mean"), mean_of(rows[-fifth:], "reward_mean")


class RunRecorder:
    """Writes one line per step as it comes, and table and picture at the end. A context manager.

    Args:
        folder: of the run.
        title: shown above the table and the picture.
        num_steps: length of the progress bar.
    """

    def __init__(self, folder: Path, title: str, num_steps: int, console: Console, *, bar: bool, tensorboard: bool):
        self.rows: list[Row] = []
        self._folder, self._title, self._console = folder, title, console
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._writer = _tensorboard_writer(folder) if tensorboard else None
        columns = (MofNCompleteColumn(), BarColumn(10), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Progress(*columns, console=console, disable=not bar)
        self._task = self._bar.add_task("steps", total=num_steps, state="starting")

    def __enter__(self) -> RunRecorder:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def record(self, row: Row) -> None:
        """Append one step to every output."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(_tag(name), value, row["step"])
            self._writer.flush()
        self._bar.update(self._task, completed=row["step"], state=step_line(row))
        log.info("step %d: %s", row["step"], json.dumps(row))
        if self._bar.disable:
            self._console.print(f"step {row['step']}: {step_line(row)}", highlight=False)

    def summarize(self) -> None:
        """Print table and reward margin, and draw `summary.png`. Does nothing for a run without steps."""
        if not self.rows:
            return
        self._bar.stop()
        self._console.print(summary_table(self.rows, self._title))
        first, last = reward_margin(self.rows)
        self._console.print(
            f"reward: {first:.3f} in the first fifth of the steps, {last:.3f} in the last: margin {last - first:+.3f}",
            highlight=False,
        )
        if (pauses := pause_line(self.rows)) is not None:
            self._console.print(pauses, highlight=False)
        draw_summary(self.rows, self._title, self._folder / "summary.png")
        self._console.print(f"outputs: {self._folder}", highlight=False, soft_wrap=True)


def step_line(row: Row) -> str:
    """Reward, loss, KL error and the verdict on the refit, in one line."""
    line = f"reward {row['reward_mean']:.3f} loss {row['loss']:+.3f} {_kl_text(row)} "
    if row.get("refit_s") is None:
        return line + "no refit"
    paused = row.get("pause_to_resume_s")
    pause = "" if paused is None else f"pause {paused * 1e3:.0f} ms "
    return line + f"refit {row['refit_s']:.2f} s {pause}{'verified' if row['refit_verified'] else 'unverified'}"


def _kl_text(row: Row) -> str:
    """The error, or the policy's drift where no token could show an error."""
    if row["gen_kl_error"] is None:
        return f"KL drift {row['gen_kl_drift']:.0e}"
    return f"KL err {row['gen_kl_error']:.0e}"


def pause_line(rows: Sequence[Row]) -> str | None:
    """From pause to resume, split into its parts, largest first: means over the refits; None where there were none."""
    names = [n for row in rows for n in row if n.startswith("pause_") and n != "pause_to_resume_s"]
    paused = [row for row in rows if row.get("pause_to_resume_s") is not None]
    if not paused:
        return None
    parts = {n[len("pause_") : -len("_s")]: sum(r.get(n) or 0.0 for r in paused) / len(paused) for n in names}
    split = " + ".join(f"{name} {s * 1e3:.1f}" for name, s in sorted(parts.items(), key=lambda part: -part[1]))
    return f"pause to resume: {mean_of(paused, 'pause_to_resume_s') * 1e3:.1f} ms = {split}"


def summary_table(rows: Sequence[Row], title: str) -> Table:
    """One line per step; refit columns are dashes where a step had none."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("step", "reward", "KL error", "refit s", "bulk MB", "misc MB", "GB/s", "transport", "verified"):
        table.add_column(name, justify="left" if name in ("transport", "verified") else "right", no_wrap=True)
    for row in rows:
        refit = ["-"] * 6
        if row.get("refit_s") is not None:
            refit = [
                f"{row['refit_s']:.3f}",
                f"{row['refit_bulk_bytes'] / 1e6:.2f}",
                f"{row['refit_misc_bytes'] / 1e6:.2f}",
                f"{row['refit_gb_per_s']:.3f}",
                row["refit_transport"],
                "yes" if row["refit_verified"] else "no",
            ]
        error = "-" if row["gen_kl_error"] is None else f"{row['gen_kl_error']:.1e}"
        table.add_row(str(row["step"]), f"{row['reward_mean']:.3f}", error, *refit)
    return table


def draw_summary(rows: Sequence[Row], title: str, path: Path) -> None:
    """Reward, KL error (log scale) and refit time over the steps, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(1.5, 1.0, 1.0))
    steps = [r["step"] for r in rows]
    rewards = [r["reward_mean"] for r in rows]
    axes[0].plot(steps, rewards, color="#9ecae1", linewidth=1.2, marker="o", markersize=3, label="mean of the step")
    axes[0].plot(steps, _running_mean(rewards, 5), color="#08519c", linewidth=2.2, label="mean of 5 steps")
    axes[0].set(ylabel="reward", ylim=(0.0, 1.02))
    axes[0].legend(loc="lower right", frameon=False)
    first, last = reward_margin(rows)
    axes[0].set_title(f"{title}\nreward {first:.2f} → {last:.2f} (first and last fifth)", fontsize=11, loc="left")
    floor = 1e-16  # equal log-probabilities have no error, which a log scale cannot show
    errors: list[float] = []
    for name, label, color in (("error", "same weights", "#a63603"), ("drift", "older weights", "#fdae6b")):
        found = [(r["step"], max(r[f"gen_kl_{name}"], floor)) for r in rows if r.get(f"gen_kl_{name}") is not None]
        errors += [value for _, value in found]
        if found:
            axes[1].semilogy(*zip(*found, strict=True), color=color, marker="o", markersize=3, label=label)
    axes[1].legend(loc="upper right", frameon=False, fontsize=8)
    axes[1].set(ylabel="KL error\ngenerator / trainer", ylim=(min(1e-14, *errors) / 3, max(1e-2, *errors) * 3))
    refits = [r for r in rows if r.get("refit_s") is not None]
    colors = ["#31a354" if r["refit_verified"] else "#bdbdbd" for r in refits]
    axes[2].bar([r["step"] for r in refits], [r["refit_s"] for r in refits], color=colors, width=0.8)
    axes[2].set(ylabel="refit, s", xlabel="step")
    note = (
        f"{sum(r['refit_verified'] for r in refits)} of {len(refits)} refits verified (green)"
        if refits
        else "no refits"
    )
    axes[2].set_title(note, fontsize=9, loc="right", color="#555555")
    for axis in axes:
        axis.grid(axis="y", color="#e0e0e0", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def _tag(name: str) -> str:
    for group in ("refit", "pause"):
        if name.startswith(f"{group}_"):
            return f"{group}/{name.removeprefix(f'{group}_')}"
    return f"timing/{name}" if name.endswith("_s") else f"train/{name}"


def _tensorboard_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))
