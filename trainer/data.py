"""The data of a training: which data sets it reads, and how several are mixed."""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from common.cli import arg, beside, check_least, here
from common.errors import RecordError, UserError
from common.files import at_root, read_records
from reasoning.datasets.files import Dropped, FieldArgs
from reasoning.datasets.loading import load_records, stored_as
from reasoning.records import PreferencePair
from reasoning.splits import held_out_prompts

if TYPE_CHECKING:
    from trainer.session import Recipe


@dataclass(frozen=True)
class DataSet:
    """One data set that a training reads. fields: its own names of our fields."""

    name: str
    config: str | None
    split: str
    fields: FieldArgs

    @property
    def source(self) -> tuple[str, str | None, str]:
        """The first arguments of the loaders in reasoning/datasets/loading.py."""
        return self.name, self.config, self.split

    @property
    def label(self) -> str:
        """The name, with the configuration and a split other than train."""
        more = [self.config, self.split if self.split != "train" else None]
        return " ".join(filter(None, [self.name, *more]))


@dataclass
class DataArgs(FieldArgs):
    dataset_name: list[str] = arg(
        [at_root("data/rewarded.jsonl")],
        "one data set or several: files, folders, or names of data sets on the hub, in any shape "
        "that reasoning/datasets/shapes.py reads. dpo: scored pairs; sft: problems with steps, or "
        "pairs; prm: step values or step labels; ppo: step values, or problems; reward: ranked "
        "answers, or pairs",
    )
    dataset_weights: list[float] | None = arg(
        None,
        "the shares of the data sets in the rows that are trained on, for example 0.7 0.3. No row "
        "is used twice: there are as many rows as the shares allow, drawn with --seed. Without it "
        "all rows of all data sets are used",
    )
    dataset_config: list[str] | None = arg(
        None, "configuration of a hub data set; one for all data sets, or one for each"
    )
    dataset_train_split: list[str] = arg(
        ["train"], "split of a hub data set or a folder; one for all data sets, or one for each"
    )
    limit: int | None = arg(None, "train on the first LIMIT rows; on all if not given")
    logs_dir: str = arg(
        at_root("logs"), "folder of the logs; a run writes <run name>/log.json and training.png"
    )
    overwrite: bool = arg(False, "replace a finished or a different training in output_dir")

    def __post_init__(self) -> None:
        check_least(self, limit=1)
        names, weights = self.dataset_name, self.dataset_weights
        if weights is not None and (len(weights) != len(names) or min(weights) <= 0):
            given = " ".join(f"{weight:g}" for weight in weights)
            raise UserError(
                f"argument --dataset_weights: expected {len(names)} numbers above 0, one for each "
                f"of --dataset_name, got {given}"
            )
        for name in ("dataset_config", "dataset_train_split"):
            values = getattr(self, name)
            if values is not None and len(values) not in (1, len(names)):
                raise UserError(
                    f"argument --{name}: expected one value, or one for each of {len(names)} data "
                    f"sets, got {len(values)}"
                )
        seen = [(os.path.realpath(data.name), data.config, data.split) for data in self.data_sets]
        for place, data in enumerate(self.data_sets):
            if seen[place] in seen[:place]:
                raise UserError(
                    f"argument --dataset_name: {data.name} is there twice; --dataset_weights sets "
                    "the share of a data set"
                )

    @property
    def data_sets(self) -> list[DataSet]:
        count = len(self.dataset_name)
        columns: list[list] = [self.dataset_config or [None], self.dataset_train_split]
        configs, splits = (values * count if len(values) == 1 else values for values in columns)
        return [
            DataSet(name, config, split, self)
            for name, config, split in zip(self.dataset_name, configs, splits, strict=True)
        ]


def read_dataset(recipe: "Recipe", data: DataSet) -> list:
    """All rows of a data set as checked records of the recipe's class.

    Odd rows are left out, and printed. Raises RecordError if no row can be used, UserError for a
    held-out problem."""
    held_out, records = held_out_prompts(), []
    dropped = Dropped()
    loaded = load_records(recipe.kinds, *data.source, dropped, data.fields.field_names)
    for where, record in loaded:
        try:
            records.append(recipe.record.from_row(asdict(record)))
        except RecordError as error:  # the others may have scores, or steps
            if isinstance(record, PreferencePair) and record.chosen_scores is None:
                error = RecordError(f"{error} (`{_scores_them(data)}`)")
            dropped.add(where, error)
            continue
        if record.prompt in held_out:
            raise UserError(
                f"{where}: a held-out problem ({held_out[record.prompt]}); training on it would "
                "spoil every comparison"
            )
    if not records:
        examples = "; ".join(dropped.examples)
        raise RecordError(f"{data.name}: none of its rows can be used; {examples}")
    dropped.print(data.name)
    return records


def _scores_them(data: DataSet) -> str:
    """The command that scores the pairs of a data set, or first brings them into the shape that can
    be scored."""
    name = data.name
    try:
        next(read_records(name, PreferencePair))
    except (RecordError, OSError):
        flags = (
            "--dataset_name",
            name,
            *data.fields.field_flags,
            "--output",
            beside(stored_as(name), "prepared"),
        )
        return here("python utils/prepare_dataset.py", *flags)
    flags = ("--input", name, "--output", beside(stored_as(name), "scored"))
    return here("python reward_model/evaluate_steps.py", *flags)


def mix(sets: Sequence[list], weights: Sequence[float] | None, seed: int) -> list[tuple[int, Any]]:
    """(number of its data set, row) of a mixture of data sets.

    weights: the shares of the data sets, which need not sum to 1; None: all rows. As with the
    `fraction` of TRL's DatasetMixtureConfig the mixture is the largest that has these shares and no
    row twice. The rows of a data set are drawn at random by the seed. They keep their order, and
    the data sets alternate, so that the first rows have about the shares of all."""
    if weights is not None:
        rng = random.Random(seed)
        size = min(len(rows) / weight for rows, weight in zip(sets, weights, strict=True))
        counts = [round(size * weight) for weight in weights]
        drawn = [sorted(rng.sample(range(len(s)), n)) for s, n in zip(sets, counts, strict=True)]
        sets = [[rows[k] for k in places] for rows, places in zip(sets, drawn, strict=True)]
    placed = [
        ((k + 0.5) / len(rows), number, row)
        for number, rows in enumerate(sets)
        for k, row in enumerate(rows)
    ]
    return [(number, row) for _, number, row in sorted(placed, key=lambda place: place[:2])]
