"""llama.cpp by itself: ``python llamacpp_raw.py MODEL.gguf SEQUENCES``, with the Python that ``peers.sh`` set up.

No server, no text: so many sequences, each with a prompt of 20 tokens, grow by one token a step through the C API. The
last word printed is tokens a second.
"""

from __future__ import annotations

import os
import sys
import time

import llama_cpp

PROMPT, WARM, STEPS = 20, 4, 44  # tokens, steps before the clock starts, steps
Row = tuple[int, int, int, bool]  # token, position, sequence, whether logits are wanted


class Decoder:
    """A model with a cache for a number of sequences."""

    def __init__(self, path: str, sequences: int) -> None:
        """Load the file; as many threads as there are cores."""
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = 512 * sequences, sequences, 512
        settings.n_threads = settings.n_threads_batch = os.cpu_count()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(max(sequences, PROMPT), 0, 1)

    def step(self, rows: list[Row]) -> None:
        """Run ``rows`` and wait for their logits.

        Raises:
            RuntimeError: llama.cpp refused them.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode says {code}")
        llama_cpp.llama_get_logits(self._context)


def main(path: str, sequences: int) -> None:
    """Fill the cache, decode, print."""
    decoder = Decoder(path, sequences)
    for sequence in range(sequences):
        decoder.step([(100 + i, i, sequence, i == PROMPT - 1) for i in range(PROMPT)])
    begin = 0.0
    for step in range(WARM + STEPS):
        if step == WARM:
            begin = time.perf_counter()
        decoder.step([(200 + sequence, PROMPT + step, sequence, True) for sequence in range(sequences)])
    seconds = (time.perf_counter() - begin) / STEPS
    print(f"{sequences} sequences: {seconds * 1e3:.2f} ms a step, tokens a second: {sequences / seconds:.1f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
