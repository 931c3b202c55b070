"""strict=True: raise an error if a weight that meets an input is not rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from magr_fx.errors import CoverageError
from magr_fx.passes.finding.find_linears import FilterFn, Rejection, Site
from magr_fx.reporting.report import MagRReport

_UNFED = "no counted calibration token reaches it"


def refuse_uncovered(
    rejections: Iterable[Rejection], unfed: Iterable[Site], filter_fn: FilterFn | None
) -> None:
    """Raise :class:`CoverageError` for weights that meet an input and would not be rewritten.

    Weights that ``filter_fn`` leaves out are allowed.
    """
    left = [
        (r.name, r.reason)
        for r in rejections
        if r.matmul and (filter_fn is None or filter_fn(r.owner, r.owner_name))
    ]
    left += [(site.name, _UNFED) for site in unfed]
    if left:
        raise CoverageError(
            f"strict=True, and {len(left)} weights that meet an input would not be rewritten: "
            f"{_some(left)}. Nothing was changed. Leave them out with filter_fn, which is called "
            "with the module that owns the parameter, or calibrate on text that reaches them "
            "(for experts: calibrate_all_experts=True)"
        )


def refuse_failed(report: MagRReport, *, written: bool) -> None:
    """Raise :class:`CoverageError` if a site failed.

    ``written`` says whether the other sites are rewritten already. If not, nothing was changed, and
    the report is emptied.
    """
    left = [(site.name, site.reason) for site in report.failed]
    if not left:
        return
    others = "Nothing was changed"
    if written:
        others = (
            f"The other {len(report.rewritten)} are rewritten (see magr_report), and nothing was "
            "quantized"
        )
    else:
        report.sites = []
    raise CoverageError(f"strict=True, and {len(left)} weights failed: {_some(left)}. {others}")


def _some(left: Sequence[tuple[str, str]]) -> str:
    named = [f"{name}: {reason}" for name, reason in left[:5]]
    return "; ".join([*named, *(["..."] if len(left) > 5 else [])])
