"""Objects that remember how they were made, as plain data, and can be made again from it without running foreign code."""

from __future__ import annotations

import inspect
from typing import Any


class Described:
    """Mixin: `self.spec` is {"class_path": ..., "init_args": ...} of the call that made the object, as plain data."""

    spec: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any):
        """Record the arguments; unpickling and copying call this without any and bring the spec along."""
        made = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs)
        bound.apply_defaults()  # a default that changes later must not change a model that was saved
        loose = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD  # of a class without arguments of its own
        named = [name for name, p in list(bound.signature.parameters.items())[1:] if p.kind not in loose]
        given = {name: plain(bound.arguments[name]) for name in named if name in bound.arguments}
        object.__setattr__(made, "spec", {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": given})
        return made


def plain(value: Any) -> Any:
    """Described objects as their spec, containers item by item, plain values as they are."""
    if isinstance(value, Described):
        return value.spec
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return f"<{type(value).__name__}>"  # shows in the card; `build` refuses the class if it needs it


def known() -> dict[str, type]:
    """Every Described class that has been imported, by class path."""
    found, queue = {}, [Described]
    while queue:
        for cls in queue.pop().__subclasses__():
            found[f"{cls.__module__}.{cls.__qualname__}"] = cls
            queue.append(cls)
    return found


def build(spec: Any) -> Any:
    """Make the object again. Only classes that are already imported can be named: a file never chooses what is imported."""
    if isinstance(spec, dict) and set(spec) == {"class_path", "init_args"}:
        classes = known()
        if spec["class_path"] not in classes:
            raise ValueError(
                f"the card names the class {spec['class_path']}, which is not among the imported parts; import the module "
                f"that defines it first. Imported: {', '.join(sorted(classes))}"
            )
        return classes[spec["class_path"]](**{name: build(value) for name, value in spec["init_args"].items()})
    if isinstance(spec, dict):
        return {name: build(value) for name, value in spec.items()}
    if isinstance(spec, list):
        return [build(value) for value in spec]
    return spec
