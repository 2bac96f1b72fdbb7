"""What the stages of a run share: the recipe, the run directory, the model, the data. Loads each thing once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from resafe.checkpoints import Checkpoint, Precision, load_model, load_tokenizer, open_checkpoint, resolve_dtype
from resafe.data.counted import CountingReader
from resafe.data.intake_sources import load_training
from resafe.data.items import Example, Question
from resafe.data.material import Material, is_question_set, load_material
from resafe.data.mixes import attack_mix, deduplicate_against, question_parts
from resafe.data.overlap import evaluation_prompts, without_overlap
from resafe.data.questions import TASKS, load_questions, task_examples
from resafe.data.training_sets import XNLI_HELD_OUT
from resafe.errors import InputError
from resafe.evals import QuestionSet
from resafe.evals.sets import Scoring
from resafe.provenance import digest_value
from resafe.recipe.own_answers import own_answers
from resafe.recipe.reporter import Reporter
from resafe.recipe.schema import Recipe, TunePart
from resafe.recipe.stage import Run, Stage

SCORING = {"arithmetic": "number", "extraction": "exact"}


@dataclass
class Context:
    """A recipe being run.

    Attributes:
        recipe: The recipe.
        run: The run directory.
        reporter: Where progress goes.
        allow_code_execution: Whether programs that models write may run, in a sandbox.
        allow_unconfined_code: Whether they may also run where the kernel has no namespaces to shut them in.
    """

    recipe: Recipe
    run: Run
    reporter: Reporter
    allow_code_execution: bool = False
    allow_unconfined_code: bool = False
    _asked: dict[Any, list[Question]] = field(default_factory=dict, repr=False)
    _pools: dict[str, list[Example]] = field(default_factory=dict, repr=False)
    _tuned_on: dict[str, Any] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Opens the model and reads all data, so that what is wrong with them is found before anything is written.

        Raises:
            InputError: The model or a data set is missing or wrong, or too small for its use.
        """
        assert self.base.tensors
        self.question_sets(tuple(self.recipe.tune))
        for name, part in self.recipe.tune.items():
            self.mix(name)
            if part.measured_by is None:
                self.task_set(name, "validation", self.recipe.questions.validation.task)
        self.texts()
        if self.recipe.utility is not None:
            from resafe.evals.utility.names import check_request, check_tasks, task_names
            from resafe.evals.utility.run import offline
            from resafe.evals.utility.tasks import check_known

            asked, data_dir = self.recipe.utility, self.recipe.data.data_dir
            names = task_names(asked.tasks)
            check_request(names, asked.limit, asked.fewshot)
            check_tasks(names, data_dir, self.allow_code_execution, self.allow_unconfined_code)
            with offline(data_dir is not None):
                check_known(names)

    def with_seed(self, seed: int) -> Context:
        """The same recipe with another seed; the questions, which are the same for all seeds, are shared."""
        recipe = self.recipe.model_copy(update={"seed": seed, "seeds": None})
        leave = (self.allow_code_execution, self.allow_unconfined_code)
        return Context(recipe, self.run, self.reporter, *leave, self._asked, self._pools, self._tuned_on)

    @cached_property
    def base(self) -> Checkpoint:
        """The chat model everything starts from."""
        return open_checkpoint(self.recipe.model.reference, allow_pickle=self.recipe.model.allow_pickle)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return load_tokenizer(self.base)

    @property
    def system(self) -> str | None:
        """The system turn of every prompt."""
        return self.recipe.model.system

    @cached_property
    def device(self) -> str:
        """The device that "auto" means here."""
        from resafe.checkpoints.precision import resolve_device

        return str(resolve_device(self.recipe.device))

    @cached_property
    def dtype(self) -> str:
        """The precision that "auto" means here, by its name; results depend on it."""
        return str(resolve_dtype(self.recipe.dtype, self.device)).removeprefix("torch.")

    def load(self, checkpoint: Checkpoint, *, merge: bool = True, device: str | None = None) -> Any:
        """A checkpoint as a model, on the run's device (or another) and in its precision."""
        return load_model(checkpoint, dtype=cast(Precision, self.dtype), device=device or self.device, merge=merge)

    def plain(self, device: str | None = None) -> Any:
        """A fresh base model (`ModelSource`)."""
        return self.load(self.base, device=device)

    @property
    def part(self) -> str:
        """What stages call the checkpoint that they write: "adapter", or "model" where all weights are trained."""
        return "model" if self.recipe.full else "adapter"

    def open_stage(self, stage: Stage) -> Checkpoint:
        """The checkpoint that a stage wrote."""
        return open_checkpoint(stage.path / self.part)

    @cached_property
    def material(self) -> Material:
        """Training pairs, free of questions; those of question sets with the model's own answers."""
        bad, good = (own_answers(self, self._trained_questions(side)) for side in ("harmful", "harmless"))
        read = self._read
        return replace(read, safety=(*read.safety, *bad), harmless=(*read.harmless, *good)) if bad or good else read

    def _trained_questions(self, side: str) -> list[Question]:
        """The training parts of the question sets that the recipe trains on."""
        names = self.recipe.data.safety if side == "harmful" else self.recipe.data.harmless
        found: list[Question] = []
        for name in filter(is_question_set, names):
            questions = load_questions(name, data_dir=self.recipe.data.data_dir)
            questions = [q for q in questions if q.metadata.get("side", side) == side]
            found += question_parts(questions, trained_on=True)["train"]
        return deduplicate_against(found, self._all_questions).kept

    @property
    def _all_questions(self) -> list[Question]:
        return [*self.harmful(), *self.harmless(), *self.harmful("validation"), *self.harmless("validation")]

    @cached_property
    def _read(self) -> Material:
        """The pairs that come with their answers."""
        data = self.recipe.data
        return load_material(
            [name for name in data.safety if not is_question_set(name)],
            [name for name in data.harmless if not is_question_set(name)],
            data_dir=data.data_dir,
            safety_limit=data.safety_limit,
            harmless_limit=data.harmless_limit,
            helpful_opening=data.helpful_opening,
            short_refusals=data.short_refusals,
            questions=self._all_questions,
            seed=self.recipe.seed,
            read=self._reader,
        )

    @cached_property
    def _reader(self) -> CountingReader:
        return CountingReader(self.recipe.data.data_dir, self.recipe.data.max_bad_share)

    def account(self) -> dict[str, Any]:
        """What became of the rows of all training sets: kept, bad with their lines, or dropped as they are evaluated.

        Raises:
            InputError: A set is missing, or has more bad rows than the recipe allows.
        """
        aligned_on = {"pairs_dropped": self._read.dropped, "sources": self._reader.to_json()}
        return {"align": aligned_on, "tune": dict(self._tuned_on)}

    def left_out(self) -> list[str]:
        """A line for people on each set of `account` that has bad rows."""
        account = self.account()
        sources = [source for part in (account["align"], *account["tune"].values()) for source in part["sources"]]
        return [
            f"{one['source']}: {sum(one['bad'].values())} of {one['rows']} rows left out, see data.json"
            for one in sources
            if one["bad"]
        ]

    @cached_property
    def material_digest(self) -> str:
        """SHA-256 over the training pairs: a file that changed, and nothing else, makes another alignment."""
        return digest_value([asdict(pair) for pair in self.material.pairs])

    def mix(self, name: str) -> list[Example]:
        """The training mix of one entry of `tune`: task examples, and compliance as the recipe has it."""
        part = self.recipe.tune[name]
        poison = self._read.compliances if part.harmful_share else []
        pool = self.task_pool(part)
        size = part.examples or round(len(pool) / (1 - part.harmful_share))
        return attack_mix(pool, poison, part.harmful_share, size, self.recipe.seed)

    def task_pool(self, tune: TunePart) -> list[Example]:
        """The training examples of a generated task, or an instruction set without what is evaluated."""
        if tune.task in TASKS:
            if tune.examples is None:
                raise InputError(f"tune: {tune.task} has rows without end", "give examples, e.g. examples: 1000")
            return task_examples(tune.task, tune.examples)
        data_dir = self.recipe.data.data_dir
        if tune.task not in self._pools:
            data = self.recipe.data
            loaded = load_training(tune.task, "examples", data_dir=data_dir, max_bad_share=data.max_bad_share)
            self._check_held_out(tune.task)
            overlap = without_overlap(loaded.examples, evaluation_prompts(data_dir, hub=data.overlap_hub))
            if not overlap.kept:
                raise InputError(f"tune: every row of {tune.task} is in an evaluation set", "name another set")
            self._pools[tune.task] = overlap.kept
            self._tuned_on[tune.task] = {"sources": [loaded.report.to_json()], "overlap": overlap.to_json()}
        return self._pools[tune.task]

    def _check_held_out(self, task: str) -> None:
        """The rows of `xnli_hi_rest` are rows of an evaluation set: those that are evaluated must come before them."""
        from resafe.evals.utility.names import task_names

        utility = self.recipe.utility
        if task != "xnli_hi_rest" or utility is None or not {"xnli", "xnli_hi"} & set(task_names(utility.tasks)):
            return
        limit = utility.limit.get("xnli_hi") if isinstance(utility.limit, dict) else utility.limit
        if limit is None or limit > XNLI_HELD_OUT:
            raise InputError(
                f"tune: xnli_hi_rest holds the rows of xnli_hi after the first {XNLI_HELD_OUT}, and more are evaluated",
                f"utility.limit.xnli_hi={XNLI_HELD_OUT} or less, or tune on alpaca_hindi",
            )

    def harmful(self, part: str = "test") -> list[Question]:
        """Harmful questions of a part."""
        return self._questions("harmful", part)

    def harmless(self, part: str = "test") -> list[Question]:
        """Harmless questions of a part."""
        return self._questions("harmless", part)

    def _questions(self, side: str, part: str) -> list[Question]:
        if (side, part) not in self._asked:  # public sets come from a file or the network: once is enough
            self._asked[side, part] = self._load_questions(side, part)
        return self._asked[side, part]

    def _load_questions(self, side: str, part: str) -> list[Question]:
        asked = self.recipe.questions
        names = asked.harmful if side == "harmful" else asked.harmless
        limit = asked.harmful_limit if side == "harmful" else asked.harmless_limit
        if part == "validation":
            limit = asked.validation.harmful if side == "harmful" else asked.validation.harmless
        found: list[Question] = []
        for name in names:
            if name in ("harmful", "harmless", "look_alike", "plain"):
                found += load_questions(name, part)
            else:  # public sets have no parts of their own: one prompt in four is for validation
                questions = load_questions(name, data_dir=self.recipe.data.data_dir)
                questions = [q for q in questions if q.metadata.get("side", side) == side]
                found += question_parts(
                    questions, trained_on=name in (*self.recipe.data.safety, *self.recipe.data.harmless)
                )[part]
        if not found:
            raise InputError(
                f"questions.{side}: no {part} questions in {', '.join(names)}", "name a larger set, or add one"
            )
        count = len(found) if limit is None else min(limit, len(found))
        return [found[place * len(found) // count] for place in range(count)]

    def question_sets(self, tasks: tuple[str, ...]) -> dict[str, QuestionSet]:
        """The test sets for a model: both safety sides, and the tasks (names in `tune`) it is measured on."""
        asked = self.recipe.questions
        sets = {
            "harmful": QuestionSet("harmful", "harmful", tuple(self.harmful()), "refusal", asked.max_new_tokens),
            "harmless": QuestionSet("harmless", "harmless", tuple(self.harmless()), "refusal", asked.max_new_tokens),
        }
        for name in tasks:
            if self.recipe.tune[name].measured_by is None:
                sets[name] = self.task_set(name, "test", asked.task_items)
        return sets

    def task_set(self, name: str, part: str, items: int) -> QuestionSet:
        """The questions of the task that the tuned model `name` was tuned on."""
        task = self.recipe.tune[name].task
        if (task, part, items) not in self._asked:
            self._asked[task, part, items] = self._task_questions(task, part, items)
        questions, scoring = tuple(self._asked[task, part, items]), cast(Scoring, SCORING.get(task, "number"))
        return QuestionSet(name, "task", questions, scoring, self.recipe.questions.task_max_new_tokens)

    def _task_questions(self, task: str, part: str, items: int) -> list[Question]:
        if task in TASKS:
            return load_questions(task, part, limit=items)
        # an instruction set is measured on the questions of its name; one prompt in four of them is for validation
        found = load_questions(task, data_dir=self.recipe.data.data_dir)
        return question_parts(found)[part][:items]

    def texts(self) -> list[str]:
        """Texts for perplexity."""
        return [question.prompt for question in load_questions(self.recipe.questions.text, "test")]


def read_json(path: Path) -> Any:
    """A JSON file that a stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
