"""Eight users in one batch over one packed base: how fast, how near to alone, and what a hundred of them weigh.

    OMP_NUM_THREADS=1 python -m tools.bench.user_batches

The base is the 135M-parameter Llama of tools/fetch_smollm2.py at 50 % zeros, packed as a bitmask; the states are
random, of rank 8 beside all linear layers, and large enough for every user to write something else. Decoding steps take
turns: a batch of eight users, one of eight times one user, one of nobody, and one user by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pst_ds.core.updates.each import EachBeside
from pst_ds.inference.bench.decode import Decoder
from pst_ds.inference.hf.model_folder import ModelFolder
from pst_ds.inference.runtime import attention, native, sparse_layers
from pst_ds.inference.runtime.dense import VectorLinear
from pst_ds.inference.runtime.quicken import quicken_decoding
from pst_ds.nn.batched_updates import LEFT, RIGHT, BatchUpdates
from pst_ds.train.users.store import Common, State, UserStore
from tools.bench.decode import packed_folder
from tools.bench.timing import conditions, print_json, progress, status_bytes
from tools.fetch_smollm2 import FOLDER

SPARSITY, BATCH, RANK, PROMPT_TOKENS, USERS = 0.5, 8, 8, 64, 100
SPEED_BAR, MEMORY_BAR = 0.7, 1.05
"""Of a batch of one user's tokens a second; times base and states."""


def make_store(folder: Path, model: Any, users: int) -> UserStore:
    """Write a store of ``users`` random states that fit ``model``, none of them in memory."""
    layers = sparse_layers(model)
    shapes = {f"{n}.{LEFT}": [m.out_features, RANK] for n, m in layers.items()}
    shapes |= {f"{n}.{RIGHT}": [RANK, m.in_features] for n, m in layers.items()}
    common = Common(
        form="beside", task="causal-lm", labels=[], base_path="", base_fingerprint="", masks_sha256={},
        shared_sha256="", beta=1.0, dtype="bf16", shapes=shapes,
    )  # fmt: skip
    store = UserStore.create(folder, common)
    for i in range(users):
        torch.manual_seed(i)
        store.add(f"user {i:03}", {name: _factor(name, shape) for name, shape in shapes.items()})
    return UserStore.open(folder, kept=users)


def _factor(name: str, shape: Sequence[int]) -> Tensor:
    """Return U or V; entries of their product have a standard deviation of 0.004."""
    return (torch.randn(*shape) * (0.014 if name.endswith(LEFT) else 0.1)).bfloat16()


class Writer:
    """A model in the middle of a text for each sample of a batch, whose samples are users."""

    def __init__(self, model: Any, updates: BatchUpdates, states: Sequence[State | None], ids: Tensor):
        """``states``: of the samples; ``ids``: their prompts, (samples, tokens)."""
        self._updates, self._states, self._decoder = updates, states, Decoder(model)
        self._like = torch.zeros(1, dtype=model.dtype)
        self.turn()
        self._decoder.prefill(ids)

    def turn(self) -> None:
        """Let the model be these users."""
        self._updates.assign(self._states, self._like)

    def step(self) -> None:
        self._decoder.step()


def speed(model: Any, store: UserStore, repeats: int) -> dict[str, Any]:
    """Return milliseconds of the processor of a step, and tokens a second against a batch of one user."""
    updates = BatchUpdates(model, store.common.shapes, store.common.beta)
    states = [store.state(name) for name in store.names[:BATCH]]
    ids = torch.randint(5, 40_000, (BATCH, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    writers = {
        "eight_users": Writer(model, updates, states, ids),
        "eight_times_one_user": Writer(model, updates, states[:1] * BATCH, ids),
        "eight_times_nobody": Writer(model, updates, [None] * BATCH, ids),
        "one_user": Writer(model, updates, states[:1], ids[:1]),
        "nobody": Writer(model, updates, [None], ids[:1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(repeats):
        for name, writer in writers.items():
            writer.turn()
            began = time.process_time()
            writer.step()
            seconds[name].append(time.process_time() - began)
    updates.remove()
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "step_cpu_ms": {name: round(1e3 * value, 1) for name, value in found.items()},
        "against_eight_times_one_user": round(found["eight_times_one_user"] / found["eight_users"], 3),
        "tokens_a_second_to_one_user_alone": round(BATCH * found["one_user"] / found["eight_users"], 2),
        "tokens_a_second_to_nobody_alone": round(BATCH * found["nobody"] / found["eight_times_nobody"], 2),
    }


def parts(model: Any, store: UserStore, repeats: int) -> dict[str, Any]:
    """Return milliseconds of the processor that parts of a step take, for eight users and for one, by turns."""
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, part: str) -> Any:
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            found = whole(*args, **kwargs)
            spent[part] += time.process_time() - began
            return found

        return mock.patch.object(owner, name, call)

    updates = BatchUpdates(model, store.common.shapes, store.common.beta)
    states = [store.state(name) for name in store.names[:BATCH]]
    ids = torch.randint(5, 40_000, (BATCH, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    writers = {str(n): Writer(model, updates, states[:n], ids[:n]) for n in (BATCH, 1)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in writers}
    with (
        timed(native, "bitmask_linear", "products"), timed(EachBeside, "added_to", "updates"),
        timed(attention, "one_query", "attention"), timed(VectorLinear, "forward", "output_layer"),
        timed(Writer, "step", "all"),
    ):  # fmt: skip
        for _ in range(repeats):
            for name, writer in writers.items():
                writer.turn()
                spent.clear()
                writer.step()
                found[name].append(dict(spent))
    updates.remove()
    return {
        name: {part: round(1e3 * statistics.median(one[part] for one in steps), 1) for part in steps[0]}
        for name, steps in found.items()
    }


@torch.inference_mode()
def nearness(folder: ModelFolder, store: UserStore) -> dict[str, Any]:
    """Return how far the logits of a mixed batch are from those of each user alone, by dtype, as a share of how far
    users are from each other; for the base model the same of a batch of nobody, which is the dtype's own rounding."""
    ids = torch.randint(5, 40_000, (BATCH, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    found = {}
    for dtype in ("fp32", "bf16"):
        model = folder.load("sparse", dtype)
        updates = BatchUpdates(model, store.common.shapes, store.common.beta)
        like = torch.zeros(1, dtype=model.dtype)
        users = [store.state(name) for name in store.names[:BATCH]]
        for name, states in (("users", users), ("nobody", [None] * BATCH)):
            updates.assign(states, like)
            together = model(input_ids=ids).logits[:, -1].float()
            alone = []
            for i, state in enumerate(states):
                updates.assign([state], like)
                alone.append(model(input_ids=ids[i : i + 1]).logits[0, -1].float())
            apart = (together - torch.stack(alone)).abs().max() / together.std()
            found[f"{dtype}_{name}"] = float(f"{float(apart):.2g}")
        updates.assign(users[:1] * BATCH, like)
        one_user = model(input_ids=ids).logits[:, -1].float()
        updates.assign(users, like)
        other = model(input_ids=ids).logits[1:, -1].float() - one_user[1:]
        found[f"{dtype}_of_users_to_each_other"] = float(f"{float(other.abs().max() / one_user.std()):.2g}")
    return found


def memory(top: Path) -> dict[str, Any]:
    """Return resident bytes with the base alone, and once all users of the store in ``top`` have written: while the
    last eight still do, whose factors are side by side for it, and after that. In a process of its own."""
    model = packed_folder(FOLDER, SPARSITY).load("sparse")
    quicken_decoding(model)
    store = UserStore.open(top, kept=USERS)
    ids = torch.full((BATCH, PROMPT_TOKENS), 7)
    decoder, updates = Decoder(model), BatchUpdates(model, store.common.shapes, store.common.beta)
    decoder.prefill(ids)
    decoder.step()
    base = status_bytes("VmRSS")
    names = store.names
    for start in range(0, len(names), BATCH):
        states = [store.state(name) for name in names[start : start + BATCH]]
        updates.assign([*states, *[None] * (BATCH - len(states))], torch.zeros(1, dtype=model.dtype))
        decoder.prefill(ids)
        decoder.step()
    writing = status_bytes("VmRSS")
    updates.assign((), torch.zeros(1))
    between = status_bytes("VmRSS")
    wanted = base + sum(store.entry(name).bytes for name in names)
    return {
        "base_bytes": base, "states_bytes": wanted - base, "between_batches_bytes": between,
        "in_a_batch_bytes": writing, "to_base_and_states": round(between / wanted, 3),
        "in_a_batch_to_base_and_states": round(writing / wanted, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print_json(memory(args.memory))
        return
    folder = packed_folder(FOLDER, SPARSITY)
    with tempfile.TemporaryDirectory() as top:
        model = folder.load("sparse")
        quicken_decoding(model)
        store = make_store(Path(top) / "store", model, USERS)
        progress("steps of batches")
        fast = speed(model, store, args.repeats)
        progress("parts of a step")
        fast["parts_cpu_ms_of_users"] = parts(model, store, args.repeats)
        progress("batches against users alone")
        near = nearness(folder, store)
        progress(f"memory of {USERS} users")
        command = [sys.executable, "-m", "tools.bench.user_batches", "--memory", str(store.folder)]
        weighed = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    met = fast["against_eight_times_one_user"] >= SPEED_BAR and weighed["to_base_and_states"] <= MEMORY_BAR
    near_enough = near["fp32_users"] < 1e-3 and near["bf16_users"] <= 2 * near["bf16_nobody"]
    print_json({
        **conditions(users=USERS, batch=BATCH, rank=RANK, sparsity=SPARSITY, repeats=args.repeats), "speed": fast,
        "nearness": near, "memory": weighed, "met": met and near_enough,
    })  # fmt: skip


if __name__ == "__main__":
    main()
