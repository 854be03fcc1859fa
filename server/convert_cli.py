"""The command that makes the files of a version, and what publishing shares with it. What is heavy loads inside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.model_files import (
    FLOAT32_FILE,
    INT8_FILE,
    figures_of,
    has_seven_bits,
    require_exporter,
)
from propolis.secure.errors import UsageError
from propolis.server.export_cli import (
    CALIBRATION_EXAMPLES,
    CalibrateFlag,
    DataFlag,
    Int8Flag,
    SevenBitsFlag,
    require_int8,
)
from propolis.server.models_cli import JsonFlag, NameArgument, RegistryFlag, VersionArgument, open_named, say_version

if TYPE_CHECKING:
    import numpy as np

    from propolis.server.golden_inputs import GoldenChoice
    from propolis.server.registry import Registry
    from propolis.server.registry_records import Version

TaskFlag = Annotated[
    str | None, typer.Option("--task", help="Built-in task, or MODULE:CLASS; the one that the run solved by default.")
]

GoldenFlag = Annotated[
    Path | None,
    typer.Option("--golden", metavar="FILE", help="Inputs for the golden batch: .npy, .json, or another's .npz."),
]
NoGoldenFlag = Annotated[bool, typer.Option("--no-golden", help="No golden batch: devices then compare nothing.")]
GoldenFromTestSetFlag = Annotated[
    bool, typer.Option("--golden-from-test-set", help="Eight inputs of the test set, which every device can read.")
]
_NEVER_CHANGED = "and what a version has is never changed: register its weights once more, as a version of its own"


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a version is converted, as the flags say."""

    task: str | None
    data: Path | None
    int8: bool
    seven_bits: bool
    calibrate: int
    golden: Path | None
    no_golden: bool
    golden_from_test_set: bool

    def __post_init__(self) -> None:
        if (self.golden is not None) + self.no_golden + self.golden_from_test_set > 1:
            raise UsageError("give one of --golden, --no-golden and --golden-from-test-set")

    @property
    def is_of_golden(self) -> bool:
        """Whether a flag says what the golden batch is made of."""
        return self.golden is not None or self.no_golden or self.golden_from_test_set

    @property
    def golden_choice(self) -> GoldenChoice:
        """What the golden batch is made of."""
        from propolis.server.golden_inputs import GoldenFrom

        if self.golden is not None:
            return self.golden
        if self.no_golden:
            return GoldenFrom.NOWHERE
        return GoldenFrom.TEST_SET if self.golden_from_test_set else GoldenFrom.DEFAULT


def convert_command(
    name: NameArgument,
    version: VersionArgument,
    int8: Int8Flag = False,
    seven_bits: SevenBitsFlag = False,
    calibrate: CalibrateFlag = CALIBRATION_EXAMPLES,
    golden: GoldenFlag = None,
    no_golden: NoGoldenFlag = False,
    golden_from_test_set: GoldenFromTestSetFlag = False,
    data: DataFlag = None,
    task: TaskFlag = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Make ONNX files of a version, compared with torch, and keep them with it."""
    require_int8(int8, seven_bits)
    how = Conversion(task, data, int8, seven_bits, calibrate, golden, no_golden, golden_from_test_set)
    opened = open_named(registry)
    wanted = opened.version(name, version)
    wanted.require_readable("to convert it")
    if wanted.is_converted:
        _require_same(opened, wanted, how)
        say_version(f"{wanted} has its files already: {_names(wanted)}", wanted, as_json)
        return
    converted, said = _convert(opened, wanted, how)
    say_version(f"{said}\nkept with {converted}: {_names(converted)}", converted, as_json)


def converted(registry: Registry, version: Version, how: Conversion) -> Version:
    """The version with what is released of it, which is made where it has none."""
    if version.is_encrypted:
        return _with_inputs(registry, version, how)
    if version.is_converted:
        _require_same(registry, version, how)
        return version
    made, said = _convert(registry, version, how)
    typer.echo(said, err=True)
    return made


def _with_inputs(registry: Registry, version: Version, how: Conversion) -> Version:
    """An encrypted version with the inputs of a golden batch, where some are asked for: devices find the outputs."""
    if how.int8:
        raise UsageError(f"{version} is encrypted: devices export it, in float32 (propolis client open makes int8)")
    if _golden_inputs(registry, version) is not None or how.no_golden or not how.is_of_golden:
        if how.is_of_golden:
            _require_same_golden(_golden_inputs(registry, version), version, how)
        return version

    from propolis.server.convert_version import attach_inputs

    made = attach_inputs(registry, version, how.task, how.data, how.golden_choice)
    _say_who_reads(registry, made, how)
    return made


def _convert(registry: Registry, version: Version, how: Conversion) -> tuple[Version, str]:
    """Convert a version, and say what came of it."""
    require_exporter()

    from propolis.convert import Quantization
    from propolis.server.convert_version import convert_version

    quantization = Quantization(how.calibrate, how.seven_bits) if how.int8 else None
    made, converted = convert_version(registry, version, how.task, how.data, quantization, how.golden_choice)
    figures: dict[str, dict[str, Any]] = {
        file: {"file": file, "bytes": len(content), **converted.metrics[file]}
        for file, content in converted.files.items()
    }
    _say_who_reads(registry, made, how)
    return made, figures_of(figures, converted.difference)


def _say_who_reads(registry: Registry, version: Version, how: Conversion) -> None:
    """Say whose inputs are in the golden batch."""
    if (inputs := _golden_inputs(registry, version)) is not None:
        source = how.golden or "the test set"
        typer.echo(f"{len(inputs)} inputs of {source} can be read by every device that gets a release", err=True)


def _golden_inputs(registry: Registry, version: Version) -> np.ndarray | None:
    from propolis.serving.golden import GOLDEN_FILE, Golden

    if all(each.name != GOLDEN_FILE for each in version.artifacts):
        return None
    return next(iter(Golden.from_bytes(registry.artifact(version, GOLDEN_FILE)).inputs.values()), None)


def _require_same(registry: Registry, version: Version, how: Conversion) -> None:
    """Raises UsageError unless the files of a version are such as are asked for."""
    names = {each.name for each in version.artifacts}
    if how.int8 and INT8_FILE not in names:
        raise UsageError(f"{version} has {FLOAT32_FILE} without {INT8_FILE}, {_NEVER_CHANGED}")
    if how.int8:
        has = has_seven_bits(registry.artifact(version, INT8_FILE))
        if has is not None and has != how.seven_bits:
            made = "with" if has else "without"
            raise UsageError(f"{INT8_FILE} of {version} was made {made} --seven-bits, {_NEVER_CHANGED}")
    if how.is_of_golden:
        _require_same_golden(_golden_inputs(registry, version), version, how)


def _require_same_golden(inputs: np.ndarray | None, version: Version, how: Conversion) -> None:
    if (inputs is None) != how.no_golden:
        raise UsageError(f"{version} has {'no' if inputs is None else 'a'} golden batch, {_NEVER_CHANGED}")
    if how.golden is not None and inputs is not None:
        from propolis.server.golden_inputs import read_inputs

        wanted = read_inputs(how.golden, inputs)
        if wanted.shape != inputs.shape or (wanted != inputs).any():
            raise UsageError(f"the golden batch of {version} is of other inputs than {how.golden}, {_NEVER_CHANGED}")


def _names(version: Version) -> str:
    return ", ".join(each.name for each in version.artifacts)
