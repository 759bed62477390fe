"""Writes tests/fixtures: small checkpoints of transformers beside the logits it computes for them.

python tests/reference/make_fixtures.py
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from variants import STORED, build

FIXTURES = Path(__file__).parents[1] / "fixtures"


def main() -> None:
    for name in STORED:
        folder = FIXTURES / name
        shutil.rmtree(folder, ignore_errors=True)
        model = build(name, seed=0)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.numpy()
        save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
