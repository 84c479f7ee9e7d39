"""Random faults at random times under load: ``python tests/soak.py``, from the checkout.

64 clients ask without a pause; some leave early, some ask for what no step bears. Every other text is compared with
that of the same request when nothing happens. The report goes to the console and into docs/reliability.md; the exit
code is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, by its path

from faulty_deployment import SLOW, TOKENS, Faulty  # noqa: E402
from serving_processes import eventually  # noqa: E402

from benchmarks.publish import replaced  # noqa: E402

STREAMS = 64
POISON = "☠"
PROMPTS = 32  # different requests
QUIET_SECONDS = (2.0, 15.0)  # between two faults
HUNG_SECONDS = 120.0  # without an answer when the faults are over
DOCUMENT = ROOT / "docs" / "reliability.md"

FAULTS: dict[str, Callable[[Faulty], None]] = {
    "agent killed": lambda faulty: faulty.agent().kill(),
    "agent stopped": lambda faulty: faulty.agent().suspend(),
    "connection cut": lambda faulty: faulty.proxy.cut(),
    "byte corrupted": lambda faulty: faulty.proxy.corrupt.set(),
    "connection stalled": lambda faulty: stall(faulty),
    "launcher killed": lambda faulty: faulty.restart_launcher(),
}


def stall(faulty: Faulty) -> None:
    """Lose all bytes for three seconds."""
    faulty.proxy.stalled.set()
    time.sleep(3.0)
    faulty.proxy.stalled.clear()
    faulty.proxy.cut()


class Soak:
    """Clients, faults, and what came of them."""

    def __init__(self, faulty: Faulty, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.seed = seed
        self._faulty = faulty
        self._over = threading.Event()
        with ThreadPoolExecutor(PROMPTS) as threads:
            self._expected = list(threads.map(faulty.ask, range(PROMPTS)))

    def run(self, seconds: float) -> None:
        """Faults for so long, then wait for what is under way."""
        chance, end = random.Random(self.seed), time.monotonic() + seconds
        clients = [
            threading.Thread(target=self._ask, args=(self.seed + i,), daemon=True) for i in range(1, STREAMS + 1)
        ]
        for client in clients:
            client.start()
        while (pause := chance.uniform(*QUIET_SECONDS)) < end - time.monotonic():
            time.sleep(pause)
            eventually(lambda: self._faulty.client.get("/health/ready").status_code == 200, 60)
            name = chance.choice(list(FAULTS))
            FAULTS[name](self._faulty)
            self.faults[name] += 1
        self._over.set()
        last = time.monotonic() + HUNG_SECONDS
        for client in clients:
            client.join(max(last - time.monotonic(), 0))
        self.outcomes["hung"] = sum(client.is_alive() for client in clients)

    def report(self, minutes: float) -> str:
        """The table of the document."""
        names = ("complete, text identical", "left early", "culprit, got an error", "text differs", "lost", "hung")
        rows = [(f"requests: {name}", f"{self.outcomes[name]:,}") for name in names]
        rows += [(f"faults: {name}", str(self.faults[name])) for name in FAULTS]
        rows.append(("share of the cache in use at the end", f"{self._faulty.gauge('kv_cache_usage_perc'):g}"))
        title = f"`python tests/soak.py --minutes {minutes:g} --seed {self.seed}`, {STREAMS} clients, 20 ms a step:"
        return "\n".join([title, "", "| | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])

    @property
    def clean(self) -> bool:
        return not any(self.outcomes[bad] for bad in ("text differs", "lost", "hung"))

    def _ask_too_much(self) -> None:
        """A prompt whose steps raise, whoever else is in them: an error is the right answer."""
        try:
            self._faulty.ask_for(f"poison {POISON}", TOKENS, streamed=True)
        except AssertionError as error:
            if "this request" not in str(error):
                raise
            self.outcomes["culprit, got an error"] += 1
        else:
            self.outcomes["text differs"] += 1

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._over.is_set():
            number = chance.randrange(PROMPTS)
            try:
                if chance.random() < 0.1:
                    self._faulty.ask_and_leave(number, after=chance.randrange(1, 20))
                    self.outcomes["left early"] += 1
                    continue
                if chance.random() < 0.02:
                    self._ask_too_much()
                    continue
                same = self._faulty.ask(number) == self._expected[number]
                self.outcomes["complete, text identical" if same else "text differs"] += 1
            except Exception as error:  # whatever it is, the client has no answer
                self.outcomes["lost"] += 1
                sys.stderr.write(f"lost: {str(error)[-200:]}\n")


def main() -> int:
    """Run the command: its exit code."""
    parser = argparse.ArgumentParser(description="Random faults at random times under load.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faulty = Faulty(Path(folder), model={**SLOW, "standin_faults": {POISON: "raise"}})
        try:
            soak = Soak(faulty, arguments.seed)
            soak.run(arguments.minutes * 60)
            eventually(lambda: faulty.gauge("num_requests_running") == 0)
            report = soak.report(arguments.minutes)
            leaked = faulty.gauge("kv_cache_usage_perc")
        except BaseException:
            sys.stderr.write(f"{faulty.agents.output[-4000:]}\n{faulty.serving.log[-8000:]}\n")
            raise
        finally:
            faulty.stop()
    sys.stdout.write(f"{report}\n")
    DOCUMENT.write_text(replaced(DOCUMENT.read_text(encoding="utf-8"), "soak", report), encoding="utf-8")
    return 0 if soak.clean and not leaked else 1


if __name__ == "__main__":
    sys.exit(main())
