"""The least time that a compiled program can take: each of its kernels at the slower of its bytes
and its products, read from the text of the program."""

import math
import re
from collections import Counter
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
PARTS = ("teacher", "student", "loss", "features", "update")  # `jax.named_scope`s of a step
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
FREE |= {"partition-id", "replica-id", "iota"}
# What a device sends in one of these over a ring, beside the bytes of its larger side.
COLLECTIVES = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
COLLECTIVES |= {"all-reduce": 2}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLED = r"\b(?:body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|[^,\s]+)"
SHAPE = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.rest)
        return None if match is None else match.group(1)

    def inputs(self, computation: "Computation") -> list[str]:
        """Their shapes."""
        return [computation[name].shape for name in self.operands if name in computation]

    @property
    def part(self) -> str:
        name = self.attribute(r'op_name="([^"]*)"') or ""
        if "/attention/" in name or "fmha" in self.rest:
            return "attention"
        return next((part for part in PARTS if f"({part})" in name or f"/{part}/" in name), "other")


Computation = dict[str, Instruction]


class Cost(NamedTuple):
    """Of one run of a program on one device."""

    seconds: Counter  # of each part, without collectives
    flops: float  # of its products
    sent: float  # bytes to other devices

    @property
    def least(self) -> float:
        return sum(self.seconds.values())


def cost(text: str, peak: float, bandwidth: float) -> Cost:
    """Of the compiled program with this text, by FLOP/s of bfloat16 products and bytes/s."""
    computations, entry = parse(text)

    def walk(computation: Computation) -> Cost:
        seconds, flops, sent = Counter(), 0.0, 0.0
        for at in computation.values():
            kind, inner, times = at.opcode.removesuffix("-start"), None, 1
            if at.opcode in ("while", "call", "async-start", "conditional"):
                names = re.findall(r"[\w.\-]+", " ".join(re.findall(CALLED, at.rest)))
                inner = min(map(walk, map(computations.get, names)), key=lambda cost: cost.least)
                times = int(at.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            elif kind in COLLECTIVES:
                sent += COLLECTIVES[kind] * max(map(size, [at.shape, *at.inputs(computation)]))
            elif at.opcode not in FREE and not at.opcode.endswith("-done"):
                count, full = products(at, computation, computations)
                rate = peak / 2 if full else peak  # of float32, as TensorFloat-32
                moved = traffic(at, computation, computations) / bandwidth
                inner = Cost(Counter({at.part: max(moved, count / rate)}), count, 0.0)
            if inner is not None:
                seconds.update({part: times * spent for part, spent in inner.seconds.items()})
                flops, sent = flops + times * inner.flops, sent + times * inner.sent
        return Cost(seconds, flops, sent)

    return walk(computations[entry])


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program, and which of them it begins with."""
    computations, entry = {}, ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            computation = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := INSTRUCTION.match(line):
            computation[match[1]] = Instruction(*match.groups())
    return computations, entry


def dims(shape: str) -> list[tuple[str, list[int]]]:
    return [(kind, [int(x) for x in sizes.split(",") if x]) for kind, sizes in SHAPE.findall(shape)]


def size(shape: str) -> int:
    return sum(BYTES[kind] * math.prod(sizes) for kind, sizes in dims(shape))


def products(at: Instruction, computation: Computation, computations: dict) -> tuple[float, bool]:
    """FLOPs of an instruction, and whether they are of float32."""
    if at.opcode == "fusion":
        inner = computations[at.attribute(r"calls=%?([\w.\-]+)")]
        each = [products(x, inner, computations) for x in inner.values()]
        return sum(flops for flops, _ in each), any(full for _, full in each)
    shapes = [dims(shape)[0] for shape in at.inputs(computation) if dims(shape)]
    if at.opcode == "custom-call" and "fmha" in at.rest:
        (_, (batch, queries, heads, width)), (_, (_, keys, *_)) = shapes[:2]
        passes = 5 if "Backward" in at.rest else 2
        share = 0.5 if "CAUSAL" in at.rest else 1.0
        return share * 2 * passes * batch * queries * heads * width * keys, False
    if at.opcode != "dot":
        return 0.0, False
    (kind, left), summed = shapes[0], at.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    depth = math.prod(left[int(i)] for i in summed.split(",") if i)
    return 2.0 * math.prod(dims(at.shape)[0][1]) * depth, kind == "f32"


def traffic(at: Instruction, computation: Computation, computations: dict) -> int:
    """Bytes that a kernel reads and writes: of an array that is cut or written into, that part."""
    if at.opcode != "fusion":
        return size(at.shape) + sum(map(size, at.inputs(computation)))
    inner = computations[at.attribute(r"calls=%?([\w.\-]+)")]
    total, spared, in_place = 0, set(), False
    for x in inner.values():
        if x.opcode in ("dynamic-slice", "gather"):
            spared.add(x.operands[0])
            total += size(x.shape)
        elif x.opcode in ("dynamic-update-slice", "scatter"):
            spared.add(x.operands[0])
            total += 2 * size(inner[x.operands[1 if x.opcode[0] == "d" else 2]].shape)
            in_place = True
    arrays = (x for x in inner.values() if x.opcode == "parameter" and x.name not in spared)
    return total + sum(size(x.shape) for x in arrays) + (0 if in_place else size(at.shape))
