"""What a prompt template reads of a row: columns by name, and among them those of `{{ fields(...) }}`.

`{{ fields("film", "synopsis", "review") }}` writes these columns as one JSON object, a line each. Nothing in it depends
on their order, so it is the one place of a template whose order may be chosen (`plan.reorder_fields`). Knows no rows;
called by `pipeline.job` and `pipeline.prompts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

FIELDS = "fields"


@dataclass(frozen=True, slots=True)
class TemplateColumns:
    """columns: all that the template reads, sorted. fields: those of its `fields(...)`, as they stand there."""

    columns: tuple[str, ...]
    fields: tuple[str, ...] = ()


def read_template(source: str) -> TemplateColumns:
    """Read a template without rendering it; jinja2.TemplateError, or ValueError for a `fields(...)` that is wrong."""
    parsed = jinja2.sandbox.ImmutableSandboxedEnvironment().parse(source)
    variables = jinja2.meta.find_undeclared_variables(parsed)
    calls = [
        call
        for call in parsed.find_all(jinja2.nodes.Call)
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == FIELDS
    ]
    if not calls or FIELDS not in variables:  # one that the template defines itself is its own affair
        return TemplateColumns(tuple(sorted(variables)))
    if len(calls) > 1:
        raise ValueError("template calls fields(...) more than once; name all columns in one call")
    if sum(name.name == FIELDS for name in parsed.find_all(jinja2.nodes.Name)) > 1:
        raise ValueError("template calls fields(...) and reads a column named fields; rename the column")
    (call,) = calls
    names = [argument.value for argument in call.args if isinstance(argument, jinja2.nodes.Const)]
    is_plain = len(names) == len(call.args) and not (call.kwargs or call.dyn_args or call.dyn_kwargs)
    if not (is_plain and names and all(isinstance(name, str) for name in names)):
        raise ValueError(
            'template must name the columns of fields(...) as texts, as in {{ fields("title", "review") }}'
        )
    if len(set(names)) < len(names):
        raise ValueError(f"template names a column twice in fields({', '.join(map(repr, names))})")
    return TemplateColumns(tuple(sorted((variables - {FIELDS}) | set(names))), tuple(names))


def value_text(value: Any) -> str:
    """A column's value as JSON; what JSON has no word for (dates, decimals) as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def write_fields(order: Iterable[str], texts: Mapping[str, str]) -> str:
    """The JSON object of `fields(...)`, from its values' `value_text`."""
    return "{\n" + ",\n".join(f"{json.dumps(name, ensure_ascii=False)}: {texts[name]}" for name in order) + "\n}"
