"""Which grammar an answer is to obey, as requests say it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dsvl2_jax.errors import UsageError
from dsvl2_jax.infer.serve.errors import ApiError
from dsvl2_jax.infer.serve.schemas import Sampling

if TYPE_CHECKING:
    from dsvl2_jax.infer.constraints import Grammar, GrammarCompiler


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What an answer must be.

    Attributes:
      kind: a method of `GrammarCompiler`.
      arguments: of the method.
      field: of the request that says so.
    """

    kind: str
    arguments: tuple[Any, ...]
    field: str

    def compile(self, compiler: GrammarCompiler) -> Grammar:
        """The grammar. Takes long: not for the event loop. Raises ApiError when there is none."""
        field = {"field": self.field} if self.arguments else {}
        try:
            return getattr(compiler, self.kind)(*self.arguments, **field)
        except UsageError as error:
            raise ApiError(400, str(error), param=self.field) from None


def constraint(body: Sampling, format_type: str | None, schema: dict[str, Any] | None, field: str) -> Constraint | None:
    """The one constraint of a request, or None.

    Args:
      format_type: of its response format: "text", "json_object", "json_schema" or None.
      schema: of that format.
      field: the response format's.

    Raises:
      ApiError: there are two of them, or a schema is missing or has none to belong to.
    """
    if format_type == "json_schema" and schema is None:
        raise ApiError(400, f"{field}: is missing the schema that type json_schema needs.", param=field)
    if format_type != "json_schema" and schema is not None:
        raise ApiError(400, f"{field}: found a schema, but the type {format_type}; expected json_schema.", param=field)
    wanted = []
    if format_type == "json_schema":
        wanted.append(Constraint("json_schema", (schema,), field))
    if format_type == "json_object":
        wanted.append(Constraint("json_object", (), field))
    if body.regex is not None:
        wanted.append(Constraint("regex", (body.regex,), "regex"))
    if body.choice is not None:
        wanted.append(Constraint("choice", (body.choice,), "choice"))
    if body.grounding:
        wanted.append(Constraint("grounding", (), "grounding"))
    if len(wanted) > 1:
        names = " and ".join(one.field for one in wanted)
        raise ApiError(400, f"{names}: an answer can obey one of them; leave out the others.", param=wanted[1].field)
    return wanted[0] if wanted else None
