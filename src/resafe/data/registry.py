"""Public data sets by name: where each lies, under which licence, and how its rows are read.

A set comes from its file in a data directory or from the Hub; the same rows give the same items and the same digest
either way. None of their text is part of this package. Other packages add sets by the entry-point group
`resafe.datasets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path

from resafe.data.formats import RowError, example_of, pair_of
from resafe.data.items import Example, Pair, Question
from resafe.data.pairs import content_id
from resafe.data.sources import FORMATS, Row, read_file, read_hub
from resafe.errors import InputError
from resafe.provenance import digest_value
from resafe.registry import nearest

Item = Example | Pair | Question
Parser = Callable[[Row], Item | None]
KINDS = ("questions", "pairs", "examples")


@dataclass(frozen=True)
class DataSource:
    """A public set.

    Attributes:
        name: The name in recipes.
        title: One line for people.
        kind: "questions", "pairs" or "examples".
        licence: As its publisher states it.
        file: Its file in a data directory.
        parse: Gives the item of a row; None leaves the row out.
        hub: Its Hub id; None if it has none.
        config: Its configuration on the Hub.
        split: Its split on the Hub.
    """

    name: str
    title: str
    kind: str
    licence: str
    file: str
    parse: Parser
    hub: str | None = None
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class LoadedSet:
    """The items of a set, without repetitions.

    Attributes:
        name: Name of the set.
        items: In the order of the source.
        digest: SHA-256 over the items in order of their ids: equal content gives equal digests, wherever it lay.
        origin: The file or Hub id it came from.
        skipped: Rows left out: repeated, empty, or without an item (for example pairs with two safe responses).
    """

    name: str
    items: tuple[Item, ...]
    digest: str
    origin: str
    skipped: int


class DataRegistry:
    """Sources by name, filled by its decorator: in the given modules and entry points, loaded on the first look-up."""

    def __init__(self, group: str, modules: Sequence[str] = ()) -> None:
        self._group = group
        self._modules = modules
        self._sources: dict[str, DataSource] = {}
        self._loaded = False

    def register(
        self,
        name: str,
        *,
        title: str,
        kind: str,
        licence: str,
        file: str,
        hub: str | None = None,
        config: str | None = None,
        split: str = "train",
    ) -> Callable[[Parser], Parser]:
        """Decorator: adds a parse function as a set; the function is returned unchanged."""

        def add(parse: Parser) -> Parser:
            if name in self._sources or kind not in KINDS:
                raise ValueError(f"data set '{name}' is registered twice, or its kind '{kind}' is not one of {KINDS}")
            self._sources[name] = DataSource(name, title, kind, licence, file, parse, hub, config, split)
            return parse

        return add

    def __iter__(self) -> Iterator[DataSource]:
        """All sources, by name."""
        if not self._loaded:
            self._loaded = True
            for module in self._modules:
                import_module(module)
            for entry in metadata.entry_points(group=self._group):
                entry.load()
        return iter(sorted(self._sources.values(), key=lambda source: source.name))

    def get(self, reference: str) -> DataSource:
        """The source with that name or Hub id.

        Raises:
            InputError: There is none; the nearest name is given.
        """
        sources = list(self)
        for source in sources:
            if reference == source.name:
                return source
        for source in sources:
            if reference == source.hub:
                return source
        names = [source.name for source in sources] + [source.hub for source in sources if source.hub]
        raise InputError(f"there is no data set '{reference}'", nearest(reference, names))


datasets = DataRegistry(
    "resafe.datasets", ["resafe.data.public", "resafe.data.public_questions", "resafe.data.training_sets"]
)


def load_set(
    reference: str,
    *,
    data_dir: Path | None = None,
    kind: str | None = None,
    columns: Mapping[str, str] | None = None,
    revision: str | None = None,
) -> LoadedSet:
    """Loads a registered set, or a user's own file.

    Args:
        reference: A registered name, its Hub id, or the path of a .jsonl, .json or .csv file.
        data_dir: Directory with the files of registered sets; None loads them from the Hub.
        kind: For a user's file: "questions" (needs `prompt`; takes `topic`, `target`), "pairs" (`prompt`, `chosen`,
            `rejected`, or another form of `formats.pair_of`) or "examples" (`prompt`, `response`, or another form of
            `formats.example_of`); None means questions.
        columns: For each of those names, the column's name in the file, where it differs.
        revision: Revision on the Hub.

    Raises:
        InputError: Unknown set, no such file, a missing column, bad JSON, or no usable row; says where.
    """
    source, file = locate(reference, data_dir=data_dir, kind=kind)
    if file is not None:
        rows = read_file(file, columns)
    else:
        rows = read_hub(str(source.hub), source.config, source.split, revision, columns)
    return _collect(source.name, rows, source.parse, str(file or source.hub))


def locate(reference: str, *, data_dir: Path | None = None, kind: str | None = None) -> tuple[DataSource, Path | None]:
    """A set, also one in a user's file, and the file to read; None where it is to be had from the Hub. Reads nothing.

    The arguments are those of `load_set`.

    Raises:
        InputError: Unknown set, or it cannot be had that way.
    """
    if reference.endswith(FORMATS):
        chosen = kind or "questions"
        if chosen not in KINDS:
            raise InputError(f"no kind {chosen!r} of data set", f"the kinds are: {', '.join(KINDS)}")
        path = Path(reference)
        return DataSource(path.stem, "", chosen, "", reference, _plain_parser(chosen, path.stem)), path
    known = {name for source in datasets for name in (source.name, source.hub)}
    if reference not in known and Path(reference).is_file():
        raise InputError(f"{reference}: is no file that can be read as a data set", f"name it {' or '.join(FORMATS)}")
    source = datasets.get(reference)
    if kind is not None and kind != source.kind:
        raise InputError(f"the set '{source.name}' holds {source.kind}, not {kind}", f"name a set of {kind}")
    if data_dir is not None:
        if not source.file:
            raise InputError(f"the set '{source.name}' is on the Hub only ({source.hub})", "leave out --data-dir")
        path = data_dir / source.file
        return source, path
    if source.hub is None:
        raise InputError(f"the set '{source.name}' is not on the Hub", "give the directory of its file by --data-dir")
    return source, None


def _collect(name: str, rows: Sequence[Row], parse: Parser, origin: str) -> LoadedSet:
    items: dict[str, Item] = {}
    for row in rows:
        try:
            item = parse(row)
        except RowError as error:
            if error.reason == "empty":
                continue
            raise InputError(f"{row.place}: {error.detail}", error.hint) from None
        if item is not None:
            items.setdefault(item.id, item)
    if not items:
        raise InputError(f"{origin}: none of the {len(rows)} rows can be used as data of '{name}'", "check its columns")
    return LoadedSet(name, tuple(items.values()), items_digest(items.values()), origin, len(rows) - len(items))


def items_digest(items: Iterable[Item]) -> str:
    """SHA-256 over items in the order of their ids."""
    return digest_value([[type(item).__name__, asdict(item)] for item in sorted(items, key=lambda item: item.id)])


def _plain_parser(kind: str, name: str) -> Parser:
    def is_plain(row: Row, *columns: str) -> bool:
        """Whether these columns hold texts, or other names were given for some: then nothing is guessed."""
        return bool(row.rename) or all(isinstance(row.values.get(column), str) for column in columns)

    def pair(row: Row) -> Item:
        if not is_plain(row, "prompt", "chosen", "rejected"):
            found = pair_of(row.values, name)
            return replace(found, side=row.text("side")) if row.has("side") else found
        prompt, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
        side = row.text("side") if row.has("side") else "safety"
        return Pair(content_id(name, prompt, chosen, rejected), prompt, chosen, rejected, side)

    def example(row: Row) -> Item:
        if not is_plain(row, "prompt", "response"):
            return example_of(row.values, name)
        prompt, response = row.text("prompt"), row.text("response")
        return Example(content_id(name, prompt, response), prompt, response)

    def question(row: Row) -> Item:
        prompt = row.text("prompt")
        topic = row.text("topic") if row.has("topic") else ""
        target = str(row.value("target")) if row.has("target") else None
        side = {"side": row.text("side")} if row.has("side") else {}
        return Question(content_id(name, prompt), prompt, topic, target, side)

    return {"pairs": pair, "examples": example, "questions": question}[kind]
