"""Packages that not everything needs, and what to say where they are missing."""

import importlib.util

_PROJECTS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def missing(*modules: str) -> str | None:
    """Say which packages are missing of those that modules come from, and how to install them; `None` if none is."""
    projects = [_PROJECTS[module] for module in modules if importlib.util.find_spec(module) is None]
    if not projects:
        return None
    return (
        f"{' and '.join(projects)}: install with `pip install 'functional_optimodules[demo]'`, or from a clone of the "
        "repository with `pip install '.[demo]'`"
    )
