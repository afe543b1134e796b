"""For researchers: studies that redo the paper's tables, and the page that shows all results."""

from importlib.util import find_spec


class MissingExtraError(ImportError, ValueError):
    """The extra is not installed; a `ValueError`, too, as the command line shows those as one sentence."""


_missing = [name for name in ("jinja2", "matplotlib", "pandas") if find_spec(name) is None]
if _missing:
    raise MissingExtraError(
        f'kvlatent study and kvlatent report need {" and ".join(_missing)}; pip install "kvlatent[lab]"'
    )
