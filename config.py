"""What a run is told: its flags, what follows from them, and which may change when it continues."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import jax

import data
import losses
import models
import mup
import optim
import sharding
import student as students
from losses import features
from models import kernels
from runtime import (
    buckets,
    commits,
    errors,
    files,
    on_policy,
    processes,
    target_store,
    trackers,
)
from runtime.errors import OUT, SEED, UserError, above, at_least, below, between, check

# A field hides the module it is named after.
Data, Optim, OnPolicy, Mup = data.Config, optim.Config, on_policy.Config, mup.Config
DEMO = Path(__file__).resolve().parent / "demo"


@dataclasses.dataclass(frozen=True)
class Mesh(sharding.Sizes):
    rules: tuple[str, ...] = ()
    """Where axes lie, over the rules that --plan prints: vocab=fsdp,tensor embed=fsdp ..."""


@dataclasses.dataclass(frozen=True)
class Config(processes.Config):
    """Distil a student from a teacher, and leave a Hugging Face checkpoint.

    python distill.py --teacher HuggingFaceTB/SmolLM2-135M --student-layers 15 --data.source a.jsonl

    The flags most often used come first, and further down --data.source, --loss.divergence,
    --loss.alpha and --optim.lr.
    """

    teacher: str | None = None
    """Hub id or folder of the teacher; by default the tiny one embedded here."""
    student_layers: Annotated[int | None, at_least(1)] = None
    """Blocks of the student; by default half of the teacher's."""
    student_params: Annotated[float | None, below(0, 1)] = None
    """Share of the parameters of the teacher's blocks: a few students with fewer blocks, narrower
    MLPs or both are cut, healed by less text, and the one with the lowest KL is trained."""
    steps: Annotated[int | None, at_least(1)] = None
    """Optimizer steps; by default 300 for the demo, else a token for every twenty parameters of the
    teacher or --student, but at least 300."""
    tokens: Annotated[int | None, at_least(1)] = None
    """Tokens to train on, in the place of --steps."""
    epochs: Annotated[float | None, above(0)] = None
    """Times to go through the text, in the place of --steps."""
    batch_size: Annotated[int, at_least(1)] = 16
    """Rows of one optimizer step, over all devices."""
    seq_len: Annotated[int | None, at_least(1)] = None
    """Tokens that each row of a batch predicts; by default 128 for the demo, else 1024 or what
    the teacher can."""
    out: Annotated[str | None, OUT] = None
    """Folder of the run; by default runs/TEACHER-12L of so many blocks, or runs/TEACHER-0.5 where
    --student-params says so."""
    config: str | None = None
    """A run's config.json, or its like in .yaml, over which flags go. Give an --out with it: what
    it says of --out, --resume, --push and processes is of its own run."""
    plan: bool = False
    """Print what each device will hold, and what to change where it does not fit; then stop."""
    export: bool = False
    """Write the student of the last checkpoint, with curves and card, and end."""
    push: str | None = None
    """Hub id of a model to upload the student to; one that is not there yet is made private."""

    targets: str | None = None
    """Folder of kept targets (targets.py): the student learns from these, and no teacher is in
    memory. It tells teacher, text and --seq-len where these flags are not given."""
    student: str | None = None
    """Hub id or folder of a student to start from, instead of a cut of the teacher."""
    student_init: str | None = None
    """Which blocks it keeps: greedy (the default), influence, uniform, first, last, a list such as
    0,2,5; or random: fresh weights. With --student and more --student-layers: grow repeats each
    block, grow-stack the whole stack, and the copies add nothing at first."""
    student_copy: tuple[str, ...] = ()
    """With --student-init random: leaves that are the teacher's, patterns such as 'embedding'."""

    student_heal: students.Heal = "auto"
    """Solve projections of a cut student for the teacher's states before the first step: of the
    blocks before and after what was removed (seams), of all from the first of these, or none; auto
    is all where the text is long enough."""
    student_stages: Annotated[int, at_least(1)] = 1
    """Remove blocks in so many stages: the student trains between them, and each later one chooses
    among the blocks that it has then."""
    heal_tokens: Annotated[int | None, at_least(1)] = None
    """Tokens of text that --student-heal reads, or all where there are fewer; by default 16384 for
    the demo, else half as many as the run trains on, from 16384 to 262144."""

    student_embed: Annotated[int | None, at_least(1)] = None
    """Width of the student, by default the teacher's: a cut keeps the channels that norms make the
    largest. With this or one of the next three, --student-layers is by default the teacher's."""
    student_mlp: Annotated[int | None, at_least(1)] = None
    """MLP width of the student: a cut keeps each block's channels of the largest activations."""
    student_heads: Annotated[int | None, at_least(1)] = None
    """Attention heads of the student, of a cut as many for each key and value head."""
    student_kv_heads: Annotated[int | None, at_least(1)] = None
    """Key and value heads of the student: a cut loses the others with all of their heads."""
    calibration_windows: Annotated[int, at_least(1)] = 4
    """Windows of text by which blocks, channels and heads are judged."""
    eval_teacher: bool = False
    """Keep the teacher for held-out figures even if the loss does not need it (alpha 0)."""
    microbatches: Annotated[int, at_least(1)] = 1
    """Parts in which a batch is computed, one after the other, to save memory."""
    seed: Annotated[int, SEED] = 0
    """Of the data's order and of fresh weights."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the student's blocks compute again in the backward pass to save memory."""
    deterministic: bool = False
    """Let GPUs add in one order, so that a run that is repeated or continued has the same bits, as
    on CPUs and TPUs; it costs speed."""
    attention: kernels.Name = "auto"
    """What attends: auto is cuDNN on NVIDIA's Hopper and later, splash on TPUs, else blockwise, or
    dense where rows are short."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What models compute in; auto is bfloat16 on accelerators, float32 on CPUs."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the exported student is stored in; auto is as what it began from, for the demo float32.
    """
    zero: Literal[1, 3] = 3
    """What --mesh.fsdp splits: 3 everything, 1 the optimizer's moments and the batch alone."""
    teacher_devices: Annotated[int | None, at_least(1)] = None
    """Give the teacher the last so many devices: it reads a batch while the student trains on the
    one before."""
    resume: bool = True
    """Continue the run in that folder; --no-resume moves it aside and starts anew."""
    resume_anyway: bool = False
    """Continue it although its mathematics has changed, and say what has."""
    time_limit: Annotated[float | None, above(0)] = None
    """Minutes of wall clock after which the run saves and stops."""
    hang_limit: Annotated[float, at_least(0)] = 0.0
    """Minutes after which a step, with the evaluation and the save that follow it, counts as hung:
    the stacks are printed and the run ends with status 1, so that a scheduler starts it again.
    0 is no limit. It includes what a later evaluation compiles, but not the step's compilation."""
    requeue_status: Annotated[int, between(0, 255)] = 0
    """Exit status of a run that was stopped before its end, for a scheduler that requeues by it."""
    eval_every: Annotated[int | None, at_least(1)] = None
    """Steps between held-out evaluations; by default 100, or a tenth of the run if that is more."""
    eval_windows: Annotated[int, at_least(1)] = 64
    """Held-out windows that an evaluation of the run reads, or all where there are fewer."""
    save_every: Annotated[int | None, at_least(1)] = None
    """Steps between checkpoints; by default 100, or a twentieth of the run if that is more, or with
    --save-minutes none."""
    save_minutes: Annotated[float | None, above(0)] = None
    """Minutes of wall clock between checkpoints."""
    keep: Annotated[int, at_least(1)] = 2
    """Checkpoints kept."""
    keep_best: bool = False
    """Keep the student with the lowest held-out KL (cross entropy without a teacher) beside the
    last, as student-best."""
    log_every: Annotated[int, at_least(1)] = 10
    """Steps between lines of metrics."""
    log_norms: bool = False
    """Add norms of parameters and gradients, per layer, to the metrics."""
    track: tuple[trackers.Name, ...] = ()
    """Send metrics, settings, curves and the final table to these trackers as well."""
    profile_steps: str | None = None
    """Steps a:b to trace, for TensorBoard or Perfetto; the trace is left in the run's folder."""
    quiet: bool = False
    """Print only warnings and the result."""
    devices: Annotated[int | None, at_least(1)] = None
    """With --plan: reckon for so many devices, which need not be there."""
    topology: str | None = None
    """With --plan: compile for these chips by their own compiler, such as h100:8 or v5p:4x4x4 (also
    h200, a100, v5e, v6e), and print the least time that a step can take there."""
    device_memory: Annotated[float | None, above(0)] = None
    """GB that each device has, for --plan and what a start refuses; by default what is found."""
    force: bool = False
    """Start even though arrays and gradients alone are more than a device has."""
    data: Data = field(default_factory=Data)
    loss: losses.Config = field(default_factory=losses.Config)
    on_policy: OnPolicy = field(default_factory=OnPolicy)
    optim: Optim = field(default_factory=Optim)
    mup: Mup = field(default_factory=Mup)
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self):
        check(self)
        if self.batch_size % self.microbatches:
            parts = f"{self.microbatches} --microbatches"
            raise UserError(f"--batch-size {self.batch_size} does not divide into {parts}")
        if self.student_init is not None:
            students.parse(self.student_init)
        sharding.Layout(self.zero, self.mesh.rules)
        if self.profile_steps is not None:
            profile_window(self.profile_steps)
        targets, apart = self.targets is not None, self.teacher_devices is not None
        writes, features = self.on_policy.fraction > 0, self.loss.features != "off"
        several = self.distributed or self.coordinator is not None
        judged = self.loss.alpha > 0 or bool(self.loss.alpha_end)
        scaled = self.mup.base_embed is not None
        alone, together = "leave one out", "it needs the teacher on the student's devices"
        amounts = [x for x in ("steps", "tokens", "epochs") if getattr(self, x) is not None]
        for conflicts, flags, reason in (
            (len(amounts) > 1, " and ".join(f"--{x}" for x in amounts), "leave one out"),
            (targets and not uses_teacher_loss(self.loss), "--targets with --loss.alpha 0", alone),
            (targets and apart, "--teacher-devices with --targets", "no teacher is in memory"),
            (writes and not judged, "--on-policy.fraction with --loss.alpha 0",
             "nobody would judge what is written"),
            (targets and writes, "--on-policy.fraction with --targets", together),
            (targets and features, "--loss.features with --targets", together),
            (apart and writes, "--on-policy.fraction with --teacher-devices", together),
            (apart and features, "--loss.features with --teacher-devices", together),
            (apart and several, "--teacher-devices with several processes", "it is for one"),
            (apart and not needs_teacher(self), "--teacher-devices with --loss.alpha 0",
             "the run has no teacher"),
            (self.devices is not None and not self.plan, "--devices without --plan",
             "a run takes the devices there are"),
            (self.topology is not None and not self.plan, "--topology without --plan",
             "a run takes the devices there are"),
            (self.topology is not None and self.devices is not None, "--topology with --devices",
             "it says how many"),
            (self.student_heal not in ("auto", "none")
             and (self.student or self.student_init == "random"), "--student-heal",
             "it is for a student that is cut from the teacher"),
            (self.student_params is not None and bool(
                self.student or self.student_layers or student_widths(self)
                or self.student_init not in (None, *students.METHODS[:-1])),
             "--student-params", "it decides which blocks and widths a cut of the teacher keeps"),
            (self.student_stages > 1 and bool(
                self.student or self.student_params or student_widths(self) or features
                or apart or not needs_teacher(self)
                or self.student_init not in (None, *students.METHODS[:-1])),
             "--student-stages", "it chooses blocks alone, with the teacher beside the student"),
            (self.export and not self.resume, "--export with --no-resume", alone),
            (not self.resume and buckets.in_bucket(self.out), "--no-resume with --out in a bucket",
             "nothing there can be moved aside, name another folder"),
            (scaled and (self.student_init != "random" or bool(self.student_copy)),
             "--mup.base-embed without --student-init random, or with --student-copy",
             "it scales weights that are all fresh, leave it out for others"),
            (scaled and self.optim.name in ("adafactor", "sgd"),
             f"--mup.base-embed with --optim.name {self.optim.name}",
             "no rule is known for it, take adamw, lion or muon"),
            (not scaled and self.mup != Mup(), "--mup.qk-scale or --mup.zero-init",
             "add --mup.base-embed, without which they do nothing"),
            (self.student is not None and self.student_init not in (None, *students.GROWTH),
             "--student-init with --student", "that student is whole already, it can only grow"),
            (self.student is None and self.student_init in students.GROWTH,
             f"--student-init {self.student_init}", "give the --student that is to grow"),
            (bool(self.student_copy) and self.student_init != "random", "--student-copy",
             "it is for fresh weights, add --student-init random"),
        ):  # fmt: skip
            if conflicts:
                raise UserError(f"{flags}: {reason}")


def profile_window(steps: str) -> tuple[int, int]:
    """The first and the last step of a:b."""
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile-steps {steps}: expected a:b, the first and last step, as 10:12")
    return int(first), int(last)


# What may differ between a run and its continuation. Of these, only `steps` and, in the later ones
# of --student-stages, `heal-tokens` change what follows.
MAY_CHANGE = frozenset({
    "--out", "--resume", "--resume-anyway", "--steps", "--tokens", "--epochs", "--time-limit",
    "--eval-every", "--eval-windows", "--eval-teacher", "--save-every", "--keep", "--keep-best",
    "--log-every", "--log-norms", "--quiet", "--mesh", "--zero", "--attention", "--deterministic",
    "--teacher-devices", "--export-dtype", "--remat", "--microbatches", "--loss.chunk",
    "--data.cache", "--data.cache-limit", "--data.streaming", "--profile-steps", "--plan",
    "--devices", "--topology", "--device-memory", "--force", "--distributed", "--coordinator",
    "--processes", "--process-id", "--requeue-status", "--export", "--push", "--save-minutes",
    "--track", "--hang-limit", "--heal-tokens",
    "--data.text-field",  # what it says of the text is compared itself
})  # fmt: skip
# Of these, the ones that a finished run cannot heed any more.
DURING_STEPS = frozenset({
    "--eval-every", "--eval-windows", "--eval-teacher", "--save-every", "--save-minutes",
    "--keep-best", "--log-every", "--log-norms", "--profile-steps", "--track",
})  # fmt: skip
# What a config.json says of its own run alone.
OF_ONE_RUN = {"out", "push", "resume", "resume-anyway", "distributed", "coordinator", "processes",
              "process-id", "config"}  # fmt: skip


def parse_flags(args: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for, over the file that its --config names."""
    args = sys.argv[1:] if args is None else args
    words = [word for arg in args for word in arg.split("=", 1)]
    if "--config" not in words[:-1]:
        return errors.cli(Config, args)
    import yaml

    path = files.local_path(words[words.index("--config") + 1])
    amounts = {"steps", "tokens", "epochs"}
    dropped = OF_ONE_RUN | (amounts if any(f"--{x}" in words for x in amounts) else set())
    try:
        flags = files.flags(yaml.safe_load(path.read_text(encoding="utf-8")))  # of JSON too
        settings = (files.arguments(x, y) for x, y in flags if x[2:] not in dropped)
        default = errors.cli(Config, [*chain(*settings)])
    except Exception as error:
        remedy = "give the config.json of a run, or its like in .yaml"
        raise UserError(f"--config {path}: {files.printable(error)}: {remedy}") from error
    if not {"--out", "--help"} & {*words}:
        raise UserError(f"--config {path}: add the --out of this run, the file's is another's")
    commits.restore(path.parent)  # ids of the hub mean what they meant in the run of its folder
    return dataclasses.replace(errors.cli(Config, args, default=default), config=None)


def with_defaults(config: Config) -> Config:
    """The configuration with every default that depends on another spelled out."""
    stored = None if config.targets is None else target_store.load(config.targets)
    named = config.teacher
    if named is None and config.student is not None and not needs_teacher(config):
        named = config.student  # nobody asks the teacher for more than a shape and a tokenizer
    elif named is None and stored is not None:
        named = stored.teacher_name
    teacher = named or str(DEMO / "teacher")
    embedded = config.teacher is None and stored is None  # the text is, whoever teaches
    if embedded and not DEMO.exists():
        raise UserError(f"{DEMO} is not there: run distill.py in its checkout, or give --teacher")
    layers = _student_layers(config, models.config(teacher))
    asked = stored.seq_len if stored is not None and config.seq_len is None else config.seq_len
    several = [teacher] if config.student is None else [teacher, config.student]
    seq_len = models.seq_len(asked, 128 if embedded else 1024, *several)
    if config.loss.features != "off":
        depth = models.config(teacher).layers
        features.pairs(config.loss.feature_pairs, layers or depth, depth)
    if config.on_policy.fraction:
        config.on_policy.lengths(seq_len)
    start, export_dtype = models.abstract(config.student or teacher), config.export_dtype
    if export_dtype == "auto":
        export_dtype = "float32" if embedded else start.embedding.dtype.name
    name = buckets.local_path(named or "demo")
    name = (name.resolve() if name.exists() else Path(str(name).partition("@")[0])).name
    compute = sharding.compute_dtype(config.compute_dtype)
    size = f"{layers}L" if layers else f"{config.student_params:g}"
    elsewhere = config.devices or config.device_memory or config.topology
    if config.compute_dtype == "auto" and config.plan and elsewhere:
        compute = "bfloat16"  # for accelerators elsewhere
    return dataclasses.replace(
        config, teacher=teacher, student_layers=layers, seq_len=seq_len, compute_dtype=compute,
        student_init=config.student_init or ("greedy" if config.student is None else None),
        out=config.out or f"runs/{name}-{size}", data=_data(config.data, stored, embedded),
        export_dtype=export_dtype, optim=_optim(config), tokens=None, epochs=None,
        **_schedule(config, None if embedded else start, config.batch_size * seq_len),
    )  # fmt: skip


def _schedule(config: Config, start: Any, a_step: int) -> dict[str, int]:
    """How many steps, of so many tokens, a run has, and between evaluations and saves, and how many
    tokens it heals by: the first tens of thousands are worth more than steps that take as long."""
    steps = config.steps
    if steps is None:  # those of --epochs follow when the text is open
        usual = sum(leaf.size for leaf in jax.tree.leaves(start)) // 20
        steps = math.ceil((config.tokens or max(usual, 300 * a_step)) / a_step)
    save_every = steps if config.save_minutes else max(100, steps // 20)
    eval_every = config.eval_every or max(100, steps // 10)
    heal_tokens = 16384 if start is None else min(max(steps * a_step // 2, 16384), 262144)
    return {
        "steps": steps, "eval_every": eval_every, "save_every": config.save_every or save_every,
        "heal_tokens": config.heal_tokens or heal_tokens,
    }  # fmt: skip


def _optim(config: Config) -> Optim:
    """The optimizer with the learning rate of what it begins from, see benchmarks/RESULTS.md."""
    whole = config.student is not None and config.student_init is None
    usual = 5e-5 if whole else 1e-3 if config.student_init == "random" else 3e-4
    return dataclasses.replace(config.optim, lr=config.optim.lr or usual)


def _data(config: Data, stored: target_store.Targets | None, embedded: bool) -> Data:
    """The text, where no flag names one: that of kept targets, the demo's, or WikiText."""
    if not config.source and stored is not None:
        values = ((f, getattr(config, f.name)) for f in dataclasses.fields(config))
        given = {field.name: value for field, value in values if value != field.default}
        config = dataclasses.replace(stored.data_config, **given)
    elif not config.source and embedded:
        stories = (str(DEMO / "stories.txt"),)
        config = dataclasses.replace(config, source=stories, documents="paragraph")
    elif not config.source:
        wikitext = "Salesforce/wikitext:wikitext-103-raw-v1"
        config = dataclasses.replace(config, source=(wikitext,), documents="article")
    return config.canonical()


def stages(config: Config) -> list[tuple[int | None, int]]:
    """The blocks of the student in each stage of a run, and the step at which it ends."""
    count = config.student_stages
    if count == 1:
        return [(config.student_layers, config.steps)]
    depth, shares = models.config(config.teacher).layers, [k / count for k in range(1, count + 1)]
    fewer = depth - config.student_layers
    return [(depth - round(fewer * share), round(config.steps * share)) for share in shares]


def _student_layers(config: Config, teacher: Any) -> int | None:
    """Blocks of the student, in agreement with the flags that say which; None where a choice among
    `candidates` is to say."""
    if config.student_params is not None:
        students.sizes(teacher, config.student_params)  # what none can have is refused
        return None
    if config.student is not None:
        layers = student_config(config).layers
        if config.student_layers not in (None, layers):
            flag, has = f"--student-layers {config.student_layers}", f"has {layers}"
            raise UserError(f"{flag}: the student in {config.student} {has}; leave the flag out")
        return layers
    method = config.student_init or "greedy"
    layers = config.student_layers or len(students.parse(method) or ())
    narrower = method != "random" and bool(student_widths(config))
    layers = layers or (teacher.layers if narrower else max(1, teacher.layers // 2))
    if method != "random":
        students.check(teacher.layers, layers, method)
        if 1 < config.student_stages > (fewer := teacher.layers - layers):
            flag = f"--student-stages {config.student_stages}"
            raise UserError(f"{flag}: there are only {fewer} blocks to remove")
        students.narrowed(teacher, **student_widths(config))
    return layers


def student_widths(config: Config) -> dict[str, int]:
    """The widths of the student that flags give."""
    widths = {x: getattr(config, f"student_{x}") for x in ("embed", "mlp", "heads", "kv_heads")}
    return {axis: width for axis, width in widths.items() if width is not None}


def student_config(config: Config) -> Any:
    """The model a run trains, before blocks are chosen."""
    widths = student_widths(config)
    if config.student_init == "random":
        return students.resized(models.config(config.teacher), config.student_layers, **widths)
    if config.student is None:
        return students.narrowed(models.config(config.teacher), **widths)
    for axis in widths:
        remedy = "that student has widths of its own, leave it out beside --student"
        raise UserError(f"--student-{axis.replace('_', '-')}: {remedy}")
    shape, how = models.config(config.student), config.student_init
    if how is None:
        return shape
    return shape.select({"layers": students.growth(shape, config.student_layers, how)})


def run_folder(config: Config) -> files.RunFolder:
    """The folder of a run, which holds its configuration."""
    settings, default = (json.loads(json.dumps(dataclasses.asdict(x))) for x in (config, Config()))
    return files.RunFolder(buckets.place(config.out), settings, MAY_CHANGE, default)


def uses_teacher_loss(loss: losses.Config) -> bool:
    """Whether the loss looks at the teacher at any step."""
    return loss.alpha > 0 or bool(loss.alpha_end) or loss.features != "off"


def needs_teacher(config: Config) -> bool:
    """Whether a run has a teacher in memory from its first step to its last."""
    return config.eval_teacher or (uses_teacher_loss(config.loss) and config.targets is None)


def describe_loss(loss: losses.Config, on_policy: OnPolicy) -> str:
    """A loss and the text that it is of: the divergence, and all that is not as usual."""
    if not uses_teacher_loss(loss):
        return "cross entropy alone"
    settings = [
        f"{field.name.replace('_', ' ')} {getattr(loss, field.name)}"
        for field in dataclasses.fields(loss)
        if getattr(loss, field.name) != field.default and field.name not in ("divergence", "chunk")
    ]
    if on_policy.fraction:
        settings.append(f"{on_policy.fraction:.0%} of the steps on the {on_policy.writer}'s text")
    return ", ".join([loss.divergence, *settings])
