"""Rebuild the embedded default from nothing: `python demo/make.py`, run in the repository root.

`stories.txt` holds the stories with the seeds from 0 on. The tokenizer and the teacher learn from
other seeds, so that these stories are new to them.
"""

import json
import shutil
import tempfile
from pathlib import Path

from stories import story

HERE = Path(__file__).parent
TEACHER = HERE / "teacher"

TEXT_STORIES = 1300
TEACHER_SEEDS = range(2_000_000, 2_024_000)
TOKENIZER_SEEDS = range(1_000_000, 1_010_000)
VOCABULARY = 2048
END = "<|endoftext|>"


def text(folder: Path = HERE) -> None:
    """The stories a student learns from, parted by blank lines."""
    stories = "\n\n".join(story(seed) for seed in range(TEXT_STORIES))
    (folder / "stories.txt").write_text(stories + "\n", encoding="utf-8", newline="\n")


def tokenizer(folder: Path = TEACHER) -> None:
    """A byte-level BPE, lossless on any text, with the settings that `transformers` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(map(story, TOKENIZER_SEEDS), trainer)
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    end = bpe.token_to_id(END)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "add_bos_token": False,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": end})


def teacher(folder: Path = TEACHER) -> None:
    """A small Llama trained on other stories by the program itself, in about half an hour."""
    import jax

    import distill
    import models
    from models.llama import Config, Llama

    shape = Config(
        vocab=VOCABULARY, embed=128, mlp=344, layers=8, heads=8, kv_heads=8, head_dim=16,
        max_positions=512, tied=True, eos=0, pad=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        seed, source, out = (f"{work}/{name}" for name in ("seed", "stories.txt", "run"))
        models.save(Llama(shape, jax.random.key(0)), seed, tokenizer=folder)
        stories = "\n\n".join(map(story, TEACHER_SEEDS))
        Path(source).write_text(stories, encoding="utf-8")
        run = distill.Config(
            teacher=seed,
            student=seed,
            data=distill.Data(source=(source,), documents="paragraph", cache=f"{work}/cache"),
            loss=distill.losses.Config(alpha=0.0),
            optim=distill.Optim(lr=3e-3, warmup=60, weight_decay=0.1),
            seq_len=256,
            steps=800,
            eval_every=200,
            export_dtype="bfloat16",
            out=out,
        )
        trained = distill.train(run)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(trained / name, folder / name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    text()
    tokenizer()
    teacher()


if __name__ == "__main__":
    main()
