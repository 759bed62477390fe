"""What a run is told: its flags, what follows from them, and which may change when it continues."""

import dataclasses
import json
import sys
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import jax

import data
import losses
import models
import optim
import sharding
import student as students
from losses import features
from runtime import checkpoint, errors, files, on_policy, target_store
from runtime.errors import UserError

# A field hides the module it is named after.
Data, Optim, OnPolicy = data.Config, optim.Config, on_policy.Config
DEMO = Path(__file__).resolve().parent / "demo"


@dataclasses.dataclass(frozen=True)
class Mesh(sharding.Sizes):
    rules: tuple[str, ...] = ()
    """Where axes lie, over the rules that --plan prints: vocab=fsdp,tensor embed=fsdp ..."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Distil a student from a teacher, and leave a Hugging Face checkpoint."""

    teacher: str | None = None
    """Hub id or folder of the teacher; by default the tiny one embedded here."""
    targets: str | None = None
    """Folder of kept targets (targets.py): the student learns from these, and no teacher is in
    memory. It tells teacher, text and --seq-len where these flags are not given."""
    student: str | None = None
    """Hub id or folder of a student to start from, instead of a cut of the teacher."""
    student_layers: int | None = None
    """Blocks of the student; by default half of the teacher's."""
    student_init: str = "greedy"
    """Which blocks it keeps: greedy, influence, uniform, first, last, a list such as 0,2,5; or
    random: fresh weights."""
    student_embed: int | None = None
    """Width of a random student; by default the teacher's."""
    student_mlp: int | None = None
    """MLP width of a random student."""
    student_heads: int | None = None
    """Attention heads of a random student."""
    student_kv_heads: int | None = None
    """Key and value heads of a random student."""
    calibration_windows: int = 4
    """Windows of text by which greedy and influence judge blocks."""
    eval_teacher: bool = False
    """Keep the teacher for held-out figures even if the loss does not need it (alpha 0)."""
    seq_len: int | None = None
    """Tokens that each row of a batch predicts; by default 128 for the demo, else 1024 or what
    the teacher can."""
    batch_size: int = 16
    """Rows of one optimizer step, over all devices."""
    microbatches: int = 1
    """Parts in which a batch is computed, one after the other, to save memory."""
    steps: int = 300
    """Optimizer steps."""
    seed: int = 0
    """Of the data's order and of fresh weights."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the student's blocks compute again in the backward pass to save memory."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What models compute in; auto is bfloat16 on accelerators, float32 on CPUs."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the exported student is stored in."""
    zero: Literal[1, 3] = 3
    """What --mesh.fsdp splits: 3 everything, 1 the optimizer's moments and the batch alone."""
    teacher_devices: int | None = None
    """Give the teacher the last so many devices: it reads a batch while the student trains on the
    one before."""
    out: str | None = None
    """Folder of the run; by default runs/<teacher>-<layers>L."""
    resume: bool = True
    """Continue the run in that folder; --no-resume moves it aside and starts anew."""
    resume_anyway: bool = False
    """Continue it although its mathematics has changed, and say what has."""
    time_limit: float | None = None
    """Minutes of wall clock after which the run saves and stops."""
    eval_every: int = 100
    """Steps between held-out evaluations."""
    eval_windows: int = 64
    """Held-out windows that an evaluation of the run reads at most, rounded up to whole batches."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    keep_best: bool = False
    """Keep the student with the lowest held-out KL (cross entropy without a teacher) beside the
    last, as student-best."""
    log_every: int = 10
    """Steps between lines of metrics."""
    log_norms: bool = False
    """Add norms of parameters and gradients, per layer, to the metrics."""
    profile_steps: str | None = None
    """Steps a:b to trace, for TensorBoard or Perfetto; the trace is left in the run's folder."""
    quiet: bool = False
    """Print only warnings and the result."""
    plan: bool = False
    """Print what each device will hold, and what to change where it does not fit; then stop."""
    devices: int | None = None
    """With --plan: reckon for so many devices, which need not be there."""
    device_memory: float | None = None
    """GB that each device has, for --plan and what a start refuses; by default what is found."""
    force: bool = False
    """Start even though arrays and gradients alone are more than a device has."""
    distributed: bool = False
    """One of several processes, which a scheduler (Slurm, Cloud TPU, GKE, Open MPI) has started."""
    coordinator: str | None = None
    """host:port of the first of several processes, where no scheduler says so."""
    processes: int | None = None
    """How many processes there are, with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""
    data: Data = field(default_factory=Data)
    loss: losses.Config = field(default_factory=losses.Config)
    on_policy: OnPolicy = field(default_factory=OnPolicy)
    optim: Optim = field(default_factory=Optim)
    mesh: Mesh = field(default_factory=Mesh)

    def __post_init__(self):
        errors.check_counts(
            self, "student_layers", "calibration_windows", "seq_len", "batch_size", "microbatches",
            "steps", "eval_every", "eval_windows", "save_every", "keep", "log_every", "devices",
            "teacher_devices", "processes",
        )  # fmt: skip
        if self.batch_size % self.microbatches:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into {self.microbatches}"
                " --microbatches"
            )
        errors.check_seed(self.seed)
        students.parse(self.student_init)
        sharding.layout(self.zero, self.mesh.rules)
        if self.profile_steps is not None:
            profile_window(self.profile_steps)
        if self.targets is not None and not uses_teacher_loss(self.loss):
            raise UserError("--targets with --loss.alpha 0 would not be read: leave one out")
        if self.targets is not None and self.teacher_devices is not None:
            raise UserError("--teacher-devices with --targets has no teacher: leave one out")
        if self.on_policy.fraction and not (self.loss.alpha or self.loss.alpha_end):
            raise UserError(
                "--on-policy.fraction with --loss.alpha 0: nobody would judge what was written;"
                " leave one out"
            )
        for flag, given in (("targets", self.targets), ("teacher-devices", self.teacher_devices)):
            for other, asked in (
                ("--on-policy.fraction", self.on_policy.fraction),
                ("--loss.features", self.loss.features != "off"),
            ):
                if given is not None and asked:
                    raise UserError(
                        f"{other} with --{flag}: it needs the teacher beside the student; leave"
                        " one out"
                    )
        if self.teacher_devices is not None and (self.distributed or self.coordinator is not None):
            raise UserError("--teacher-devices is for one process: leave it out with several")
        if self.devices is not None and not self.plan:
            raise UserError("--devices is for --plan; a run takes the devices there are")
        if self.teacher_devices is not None and not needs_teacher(self):
            raise UserError("--teacher-devices with --loss.alpha 0 has no teacher: leave one out")
        for name in ("time_limit", "device_memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}: it must be positive")


def profile_window(steps: str) -> tuple[int, int]:
    """The first and the last step of a:b."""
    first, colon, last = steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile-steps {steps}: expected a:b, the first and last step, as 10:12")
    return int(first), int(last)


# What may differ between a run and its continuation. Of these, only `steps` changes what follows:
# the schedules end there.
MAY_CHANGE = {
    "--out", "--resume", "--resume-anyway", "--steps", "--time-limit", "--eval-every",
    "--eval-windows", "--eval-teacher", "--save-every", "--keep", "--keep-best", "--log-every",
    "--log-norms", "--quiet", "--mesh", "--zero", "--teacher-devices", "--export-dtype", "--remat",
    "--microbatches", "--loss.chunk", "--data.cache", "--data.streaming", "--profile-steps",
    "--plan", "--devices", "--device-memory", "--force", "--distributed", "--coordinator",
    "--processes", "--process-id",
}  # fmt: skip


def with_defaults(config: Config) -> Config:
    """The configuration with every default that depends on another spelled out."""
    source, made = (
        config.data,
        None if config.targets is None else target_store.load(config.targets),
    )
    embedded = config.teacher is None and made is None  # the text is, whatever stands for a teacher
    if config.teacher is None and config.student is not None and not needs_teacher(config):
        # Nobody asks the teacher for more than a shape and a tokenizer.
        config = dataclasses.replace(config, teacher=config.student)
    elif config.teacher is None and made is not None:
        config = dataclasses.replace(config, teacher=made.teacher_name)
    if made is not None and not source.source:
        fields = dataclasses.fields(source)
        given = {f.name: getattr(source, f.name) for f in fields}
        given = {f.name: given[f.name] for f in fields if given[f.name] != f.default}
        source = dataclasses.replace(made.data_config, **given)
    elif not source.source and embedded:
        source = dataclasses.replace(
            source, source=(str(DEMO / "stories.txt"),), documents="paragraph"
        )
    elif not source.source:
        source = dataclasses.replace(source, source=("Salesforce/wikitext:wikitext-103-raw-v1",))
    teacher = config.teacher or str(DEMO / "teacher")
    settings = models.config(teacher)
    limits = [settings.longest]
    if config.student is not None:
        limits.append(models.config(config.student).longest)
    longest = min((limit for limit in limits if limit is not None), default=None)
    if config.seq_len is not None and longest is not None and config.seq_len > longest:
        raise UserError(f"--seq-len {config.seq_len}: the model was made for {longest} positions")
    usual = min(128 if embedded else 1024, longest or 1024)
    usual = usual if made is None else made.seq_len
    layers, listed = config.student_layers, students.parse(config.student_init)
    if listed is not None:
        layers = layers or len(listed)
    if config.student is not None:
        layers = models.config(config.student).layers
        if config.student_layers not in (None, layers):
            raise UserError(
                f"--student-layers {config.student_layers}: the student in {config.student} has"
                f" {layers}; leave the flag out"
            )
    layers = layers or max(1, settings.layers // 2)
    if config.student is None and config.student_init != "random":
        students.check(settings.layers, layers, config.student_init)
    if config.loss.features != "off":
        features.pairs(config.loss.feature_pairs, layers, settings.layers)
    if config.on_policy.fraction:
        config.on_policy.lengths(config.seq_len or usual)
    name = "demo"
    if config.teacher is not None:
        folder = Path(config.teacher)
        name = (folder.resolve() if folder.exists() else Path(teacher.partition("@")[0])).name
    compute = sharding.compute_dtype(config.compute_dtype)
    if config.compute_dtype == "auto" and config.plan and (config.devices or config.device_memory):
        compute = "bfloat16"  # for accelerators elsewhere
    return dataclasses.replace(
        config,
        teacher=teacher,
        student_layers=layers,
        seq_len=config.seq_len or usual,
        compute_dtype=compute,
        out=config.out or f"runs/{name}-{layers}L",
        data=source,
    )


def student_config(config: Config) -> Any:
    """The model a run trains, before blocks are chosen."""
    widths = {
        name: getattr(config, f"student_{name}") for name in ("embed", "mlp", "heads", "kv_heads")
    }
    if config.student is None and config.student_init == "random":
        return students.resized(models.config(config.teacher), config.student_layers, **widths)
    for name, width in widths.items():
        if width is not None:
            flag, remedy = name.replace("_", "-"), "add --student-init random"
            remedy = remedy if config.student is None else "leave it out beside --student"
            raise UserError(f"--student-{flag} is for fresh weights: {remedy}")
    return models.config(config.teacher if config.student is None else config.student)


def check_resumable(config: Config, out: Path) -> None:
    """A run that is to be continued must have the configuration that is noted there."""
    path, content = out / "config.json", as_json(config)
    now, before = flags(content), flags(files.read_json(path) if path.exists() else content)
    changed = [
        f"{flag} was {before.get(flag)}, is {value}"
        for flag, value in now.items()
        if value != before.get(flag) and not MAY_CHANGE & {flag, flag.partition(".")[0]}
    ]
    begun = checkpoint.latest(out / "checkpoints") is not None
    if changed and begun and not config.resume_anyway:
        raise UserError(
            f"{out} holds a run with other settings ({'; '.join(changed)}): give the same,"
            " another --out, --no-resume, or --resume-anyway to go on with these"
        )
    if changed and begun:
        say(config, f"continued anyway: {'; '.join(changed)}")
    if begun and now["--steps"] != before.get("--steps"):
        say(config, f"--steps was {before.get('--steps')}: schedules now end at {config.steps}")
    if changed and not begun and jax.process_index() == 0:
        (out / "choice.json").unlink(missing_ok=True)


def write_config(config: Config, out: Path) -> None:
    """Writes down the configuration."""
    if jax.process_index() == 0:
        files.write_json(out / "config.json", as_json(config))


def as_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flags(content: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """A configuration as its flags."""
    found = {}
    for name, value in content.items():
        flag = prefix + name.replace("_", "-")
        found |= flags(value, flag + ".") if isinstance(value, dict) else {flag: value}
    return found


def uses_teacher_loss(loss: losses.Config) -> bool:
    """Whether the loss looks at the teacher at any step."""
    return loss.alpha > 0 or bool(loss.alpha_end) or loss.features != "off"


def needs_teacher(config: Config) -> bool:
    """Whether a run has a teacher in memory from its first step to its last."""
    return config.eval_teacher or (uses_teacher_loss(config.loss) and config.targets is None)


def describe_loss(loss: losses.Config, text: OnPolicy | None = None) -> str:
    """A loss, and whose `text` it is of, in words."""
    if not uses_teacher_loss(loss):
        return "cross entropy alone"

    def course(start: float, end: float | None, schedule: str) -> str:
        return f"{start:g}" if end is None else f"{start:g} to {end:g} ({schedule})"

    share = course(loss.alpha, loss.alpha_end, loss.alpha_schedule)
    temperature = course(loss.temperature, loss.temperature_end, loss.temperature_schedule)
    settings = {"jsd": f", beta {loss.beta:g}"}
    settings |= dict.fromkeys(("skew_kl", "skew_reverse_kl"), f", skew {loss.skew:g}")
    settings["alpha_beta"] = f", a {loss.ab_alpha:g}, b {loss.ab_beta:g}"
    told = f"{loss.divergence} at temperature {temperature}{settings.get(loss.divergence, '')}"
    told = told if share == "1" else f"{share} x {told}, the rest cross entropy"
    if loss.features != "off":
        ends = loss.feature_weight, loss.feature_weight_end, loss.feature_weight_schedule
        told += f"; {course(*ends)} x {loss.features} between hidden states"
    if text is not None and text.fraction:
        told += f"; at {text.fraction:.0%} of the steps on text that the {text.writer} writes"
    return told


def say(config: Config, text: str) -> None:
    if not config.quiet and jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
