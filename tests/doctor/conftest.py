"""Real runs to be looked at: trained once, then copied and broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moectl.config.schema import ExperimentConfig
from moectl.training.state import load_checkpoint, newest_checkpoint, save_checkpoint
from moectl.walk.train import RunRequest, start_run
from tests.support import write_corpus

STEPS = 8
#: A top-1 router of one's own; ``{…}`` are the places where a test plants its mistake.
ROUTER = '''
import torch
from moectl.moe import Router, RouterConfig, RouterOutput
from moectl.moe.router import entropy, stable_topk


class Mine(Router):
    """Straight-through top-1."""

    class Config(RouterConfig):
        pass

    {attributes}

    def __init__(self, config, *, hidden_size, num_experts):
        super().__init__(config, hidden_size=hidden_size, num_experts=num_experts)
        {init}

    def route(self, x_TD, mask_T):
        logits = self.logits(x_TD)
        noisy = logits
        {change}
        probs = torch.softmax(noisy, -1)
        chosen = stable_topk(noisy.detach(), 1)
        soft = probs.gather(1, chosen)
        weights = 1.0 + (soft - soft.detach()) if self.training else torch.ones_like(soft)
        clean = torch.softmax(logits, -1)
        {end}
        return RouterOutput(chosen, weights, logits, probs, clean, entropy(clean))
'''


def router_source(*, attributes: str = "", init: str = "pass", change: str = "", end: str = "") -> str:
    return ROUTER.format(attributes=attributes, init=init, change=change, end=end)


class Lab:
    """A project with a home, text and data; everything in it is real."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_corpus(folder / "texts")

    @property
    def runs(self) -> Path:
        return self.folder / "home" / "runs"

    def config(self, name: str, **changes: Any) -> ExperimentConfig:
        values: dict[str, Any] = {
            "name": name,
            "data": {
                "domains": ["fish", "sums"],
                "source": str(self.folder / "texts"),
                "tokenizer": "bpe:300",
                "block_size": 16,
            },
            "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "head_dim": 8},
            "moe": {"router": {"name": "top1"}, "num_experts": 4, "layers": "all"},
            "optim": {"warmup_steps": 2},
            "train": {"steps": STEPS, "batch_size": 8, "threads": 1, "checkpoint_every": 4},
        }
        for key, value in changes.items():
            old = values.get(key)
            values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return ExperimentConfig.model_validate(values)

    def train(self, name: str, **changes: Any) -> Path:
        """A run of that name, trained now."""
        outcome = start_run(self.config(name, **changes), RunRequest())
        assert outcome.status == "finished", outcome
        return outcome.folder

    def train_router(self, name: str, source: str, **changes: Any) -> Path:
        """A run with a router of its own."""
        file = self.folder / f"{name.replace('-', '_')}.py"
        file.write_text(source, encoding="utf-8")
        moe = {"router": {"name": f"{file}:Mine"}, "num_experts": 4, "layers": "all"}
        return self.train(name, moe=moe, **changes)

    def broken(
        self,
        source: Path,
        name: str,
        edit: Callable[[dict[str, Tensor]], None],
        edit_state: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> Path:
        """A copy of a run whose newest checkpoint has been edited; its manifest fits."""
        folder = self.runs / name
        shutil.copytree(source, folder)
        newest, _ = newest_checkpoint(folder / "checkpoints")
        checkpoint = load_checkpoint(newest.folder)
        edit(checkpoint.tensors["model"])
        edit_state(checkpoint.state)
        save_checkpoint(
            folder / "checkpoints", checkpoint.step, checkpoint.tensors, checkpoint.state, keep=2, protect=(0,)
        )
        return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOECTL_HOME", str(folder / "home"))
        patch.chdir(folder)
        yield Lab(folder)


@pytest.fixture(scope="module")
def healthy(lab: Lab) -> Path:
    """A top-1 run with nothing wrong."""
    return lab.train("healthy")
