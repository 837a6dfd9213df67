"""The trainings and optimizers that compare_optimizers.py compares, grouped by question."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from variants import VARIANTS

LADDER = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 1.5, 2, 3, 5, 7))

# The rest in the records of characters and speech, older than today's default: AdamW with momentum.
MOMENTUM_OF_REST = ("--rest-option=betas=[0.9, 0.95]", "--rest-option=factored=false")


@dataclass(frozen=True)
class Training:
    """An example with arguments that change its length, batch or model.

    Attributes:
        task: "language_model" or "speech".
        arguments: Arguments of the example.
        title: Title in pictures and tables.
        rest: Arguments for the parameters that are not hidden, while the rate of the hidden
            matrices is searched.
        shift: How many places of the ladder the first rates are above those of the task.
        first_rates: Number of neighbouring rates that a search starts with.
        seeds: Number of seeds that run at the best rate.
    """

    task: str
    arguments: tuple[str, ...]
    title: str
    shift: int = 0
    first_rates: int = 4
    seeds: int = 3
    rest: tuple[str, ...] = ("--rest-learning-rate=0.01", *MOMENTUM_OF_REST)


REST_OF_SPEECH = ("--rest-learning-rate=0.02", *MOMENTUM_OF_REST)
REST_OF_WORDS = ("--rest-learning-rate=0.02",)

TRAININGS = {
    "language_model": Training("language_model", (), "language model, 300 steps"),
    "language_model_1500": Training(
        "language_model", ("--steps=1500",), "language model, 1,500 steps", -1
    ),
    "language_model_6000": Training(
        "language_model", ("--steps=6000",), "language model, 6,000 steps", -2
    ),
    "language_model_wide": Training(
        "language_model", ("--width=128",), "language model, width 128", -1
    ),
    "language_model_small_batch": Training(
        "language_model", ("--batch-size=2", "--steps=1200"), "language model, batches of 2", -3
    ),
    "language_model_large_batch": Training(
        "language_model", ("--batch-size=32", "--steps=75"), "language model, batches of 32", 1
    ),
    "language_model_256": Training(
        "language_model", ("--width=256",), "language model, width 256", -1, 3, 2
    ),
    "language_model_512": Training(
        "language_model", ("--width=512",), "language model, width 512", -1, 3, 2
    ),
    "language_model_depth_4": Training(
        "language_model", ("--width=128", "--layers=4"), "language model, 4 layers", -1, 3, 2
    ),
    "language_model_depth_8": Training(
        "language_model", ("--width=128", "--layers=8"), "language model, 8 layers", -1, 3, 2
    ),
    "language_model_zero": Training(
        "language_model",
        ("--width=128", "--zero-outputs"),
        "language model, output projections from zero",
        -1,
        3,
        2,
    ),
    "language_model_long": Training(
        "language_model",
        ("--width=256", "--layers=4", "--steps=3000"),
        "language model, width 256, 4 layers, 3,000 steps",
        -4,
        3,
        2,
    ),
    "speech": Training("speech", (), "speech, 400 steps", rest=REST_OF_SPEECH),
    "speech_1600": Training(
        "speech", ("--steps=1600",), "speech, 1,600 steps", -1, rest=REST_OF_SPEECH
    ),
    "words_4096": Training(
        "language_model", ("--tokens=words",), "4,096 words, 300 steps", rest=REST_OF_WORDS
    ),
    "words_4096_tied": Training(
        "language_model",
        ("--tokens=words", "--tied"),
        "4,096 words, tied, 300 steps",
        rest=REST_OF_WORDS,
    ),
    "words_16384": Training(
        "language_model",
        ("--tokens=words", "--vocabulary=16384"),
        "16,384 words, 300 steps",
        first_rates=3,
        seeds=2,
        rest=REST_OF_WORDS,
    ),
}
EVERYWHERE = tuple(TRAININGS)
WORDS = ("words_4096", "words_4096_tied", "words_16384")
WITHOUT_WORDS = tuple(name for name in TRAININGS if name not in WORDS)
WITHOUT_LARGE = (
    "language_model",
    "language_model_1500",
    "language_model_6000",
    "language_model_wide",
    "language_model_small_batch",
    "language_model_large_batch",
    "speech",
    "speech_1600",
)
SIZES = ("language_model", "language_model_wide", "language_model_256", "language_model_512")
DEPTHS = ("language_model_wide", "language_model_depth_4", "language_model_depth_8")
MAIN = ("language_model", "language_model_1500", "speech")
SHORT = ("language_model", "speech")
FIRST = ("language_model",)
FEW = ("language_model", "language_model_1500", "speech", "speech_1600")
BLOCKED = ("language_model_256", "language_model_512")


WHICH = "Which optimizer, at how much state"
MOMENTUM = "How much momentum"
BITS = "How many bits of momentum"
BLOCKS = "How many rows are orthogonalized at a time"
REST = "Which optimizer for embedding and head"
LAW = "What the rates cost that the library picks"
BANDS = "Frequency-adaptive momentum"


@dataclass(frozen=True)
class Configuration:
    """An optimizer and the search for its best rate.

    Attributes:
        question: The table that lists it.
        arguments: Arguments of the example.
        first_rates: Lowest rate that the search tries first, by task.
        trainings: Trainings that measure it.
        searched: Argument that the search sets. Empty: the library picks all rates.
        rate_of: Another configuration, whose best rate of the hidden matrices is used. If the
            search would set this rate, there is no search.
    """

    question: str
    arguments: tuple[str, ...]
    first_rates: Mapping[str, float]
    trainings: tuple[str, ...] = SHORT
    searched: str = "--learning-rate"
    rate_of: str = ""

    def first_rates_in(self, training: str, count: int) -> tuple[float, ...]:
        """The rates of the ladder that the search tries first."""
        trained = TRAININGS[training]
        start = LADDER.index(self.first_rates[trained.task]) + trained.shift
        return LADDER[start : start + count]


def options(flag: str = "--option", /, **values: object) -> tuple[str, ...]:
    """Write options as command-line arguments of an example."""
    return tuple(f"{flag}={name}={json.dumps(value)}" for name, value in values.items())


def rates(language_model: float, speech: float) -> dict[str, float]:
    return {"language_model": language_model, "speech": speech}


def maxfactor(
    question: str,
    trainings: tuple[str, ...] = SHORT,
    first_rates: Mapping[str, float] | None = None,
    **given: object,
) -> Configuration:
    """A configuration with MaxFactor as published."""
    return named(question, "maxfactor", first_rates or rates(0.02, 0.01), trainings, **given)


def named(
    question: str,
    optimizer: str,
    first_rates: Mapping[str, float],
    trainings: tuple[str, ...] = SHORT,
    **given: object,
) -> Configuration:
    """A configuration with the named optimizer for the hidden matrices."""
    arguments = (f"--optimizer={optimizer}", *options(**given))
    return Configuration(question, arguments, first_rates, trainings)


def variant(
    other: str, question: str, trainings: tuple[str, ...], *arguments: str, **given: object
) -> Configuration:
    """Another configuration with more arguments and options, at the same rate."""
    base = CONFIGURATIONS[other]
    arguments = (*base.arguments, *arguments, *options(**given))
    return replace(base, question=question, arguments=arguments, trainings=trainings, rate_of=other)


def mel_axis(**given: object) -> Configuration:
    """MaxFactor on the hidden matrices, and MaxFactor with these options on the first layer."""
    hidden = ("--optimizer=maxfactor", *options(momentum=0.9, cautious=True))
    hidden = (*hidden, "--learning-rate=0.015")
    first = options("--convolution-option", **given)
    return Configuration(
        BANDS, (*hidden, *first), {"speech": 0.01}, ("speech",), "--convolution-learning-rate"
    )


MUON = rates(0.02, 0.015)

CONFIGURATIONS: dict[str, Configuration] = {
    "OrthoMaxFactor": named(WHICH, "orthomaxfactor", rates(0.03, 0.015), EVERYWHERE),
    "OrthoMaxFactor, no momentum": named(
        WHICH, "orthomaxfactor", rates(0.05, 0.02), WITHOUT_WORDS, momentum=0
    ),
    "Muon 0.8": named(WHICH, "muon", MUON, EVERYWHERE, momentum=0.8),
    "AdamW": named(WHICH, "adamw", rates(2e-3, 1e-3), EVERYWHERE),
    "MaxFactor, cautious": maxfactor(WHICH, WITHOUT_LARGE, momentum=0.9, cautious=True),
    "MaxFactor": maxfactor(WHICH, SHORT, rates(0.05, 0.015), momentum=0),
    "Muon 0": named(WHICH, "muon", rates(0.03, 0.015), MAIN, momentum=0),
    "NorMuon 0.8": named(WHICH, "normuon", rates(0.03, 0.015), SHORT, momentum=0.8),
    "mlx AdamW": named(
        WHICH,
        "mlx_adamw",
        rates(1e-3, 1e-3),
        (*MAIN, "language_model_256", "language_model_long"),
    ),
    "mlx AdamW on all": Configuration(
        WHICH, ("--optimizer=mlx_adamw", "--rest=same"), rates(2e-3, 1e-3), WORDS
    ),
    "mlx Adafactor": named(WHICH, "mlx_adafactor", rates(0.02, 0.01), MAIN),
    "mlx Adafactor, beta_1 0.9": named(
        WHICH, "mlx_adafactor", rates(0.02, 0.01), FIRST, beta_1=0.9
    ),
    "Muon 0.5": named(MOMENTUM, "muon", MUON, MAIN, momentum=0.5),
    "Muon 0.9": named(MOMENTUM, "muon", MUON, (*MAIN, "language_model_6000"), momentum=0.9),
    "Muon": named(MOMENTUM, "muon", MUON, MAIN),
    "MaxFactor, momentum": maxfactor(MOMENTUM, momentum=0.9, cautious=False),
    "MaxFactor, Nesterov": maxfactor(MOMENTUM, momentum=0.9, cautious=False, nesterov=True),
    "MaxFactor, cautious, bf16": maxfactor(
        BITS, momentum=0.9, cautious=True, state_dtype="bfloat16"
    ),
    "MaxFactor, FAM": maxfactor(BANDS, momentum={"bands": 10}, cautious=False),
    "MaxFactor, cautious FAM": maxfactor(BANDS, momentum={"bands": 10}, cautious=True),
    # Frequency-adaptive momentum (FAM) where inputs have frequencies, and other rules for it.
    "mel axis: no momentum": mel_axis(momentum=0),
    "mel axis: momentum": mel_axis(momentum=0.9, cautious=True),
    "mel axis: FAM": mel_axis(momentum={"bands": 10}, cautious=True),
    **{
        f"mel axis: {variant.replace('_', ' ')}": mel_axis(
            momentum={"bands": 10, "variant": variant}, cautious=True
        )
        for variant in VARIANTS
        if variant != "published"
    },
}
CONFIGURATIONS |= {
    "OrthoMaxFactor, total_steps alone": replace(
        CONFIGURATIONS["OrthoMaxFactor"], question=LAW, searched=""
    ),
    "OrthoMaxFactor, AdamW with momentum on the rest": Configuration(
        REST,
        (*CONFIGURATIONS["OrthoMaxFactor"].arguments, *MOMENTUM_OF_REST),
        rates(0.02, 0.02),
        WORDS,
        "--rest-learning-rate",
        rate_of="OrthoMaxFactor",
    ),
    "OrthoMaxFactor, momentum in float32": variant(
        "OrthoMaxFactor", BITS, FEW, state_dtype="float32"
    ),
    "OrthoMaxFactor, momentum in 8 bits": variant("OrthoMaxFactor", BITS, FEW, state_dtype="int8"),
    "Muon 0.8, 4 bits": variant("Muon 0.8", BITS, FEW, state_dtype="int4"),
    **{
        f"OrthoMaxFactor, block={block}": variant("OrthoMaxFactor", BLOCKS, BLOCKED, block=block)
        for block in (32, 64, 256, None)
    },
}
