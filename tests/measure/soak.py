"""Kills processes of a run a hundred times, and compares what comes out with an undisturbed run.

    python -m tests.measure.soak [--kills 100] [--rows 3000] [--seed 0] [--folder DIR]

Ranks, torchrun's agent, loader processes, their fork servers, or all processes at once die by SIGKILL at random
moments; the run is restarted with one to three ranks whenever torchrun does not do that by itself. The last line is
JSON. It fails if a row is missing, done twice with different results, or differs from the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.support.runs import HANG_SECONDS, Killer, Run, Workspace, lingering, make_corpus

#: How often each kind of victim is chosen. Loader processes are replaced in milliseconds; what else dies costs seconds.
VICTIMS = {"loader": 50, "rank": 25, "agent": 8, "server": 9, "everything": 8}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when absent")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        return soak(arguments.folder, arguments.kills, arguments.rows, arguments.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        return soak(Path(folder), arguments.kills, arguments.rows, arguments.seed)


def soak(folder: Path, num_kills: int, num_rows: int, seed: int) -> int:
    """Runs, kills, compares, reports."""
    chance = random.Random(seed)
    corpus = make_corpus(folder / "corpus", num_rows, seed=seed)
    undisturbed = Workspace.make(corpus, folder / "undisturbed")
    undisturbed.finish(1, timeout=3600)
    workspace = Workspace.make(corpus, folder / "killed")
    kills: Counter[str] = Counter()
    starts = 0
    began = time.monotonic()
    rows_a_kill = num_rows / (num_kills + 10)
    while kills.total() < num_kills:
        starts += 1
        with workspace.start(chance.randint(1, 3), "--num_workers", 1, launcher=["--max_restarts=100"]) as run:
            killer = Killer(workspace, run, seed=chance.randrange(2**32))
            while kills.total() < num_kills:
                victim = chance.choices(list(VICTIMS), list(VICTIMS.values()))[0]
                _await_its_turn(workspace, run, rows_a_kill * kills.total())
                if victim == "everything":
                    run.kill()
                else:
                    killer.kill(victim)
                kills[victim] += 1
                print(f"{kills.total():3} {victim:10} {workspace.rows_done()}/{num_rows} rows", flush=True)
                if victim in ("agent", "everything"):
                    break
            else:
                assert run.wait(3600) == 0, run.output()
    starts += 1
    workspace.finish(3, "--num_workers", 1, timeout=3600)
    workspace.check_complete(undisturbed.outputs(), redone=True)
    psutil.wait_procs(list(lingering(workspace.folder)), HANG_SECONDS)
    assert not list(lingering(workspace.folder)), "processes are left"
    entries = len(workspace.ledger())
    figures = {
        "kills": kills.total(),
        **kills,
        "starts": starts,
        "attempts": len(list((workspace.run_dir / "attempts").iterdir())),
        "rows": num_rows,
        "rows_done_again": entries - num_rows,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(figures))
    return 0


def _await_its_turn(workspace: Workspace, run: Run, rows: float) -> None:
    """Spreads the kills over the run."""
    workspace.await_rows(int(rows), run, timeout=600)


if __name__ == "__main__":
    sys.exit(main())
