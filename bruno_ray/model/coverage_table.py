"""Which share of the parameters that write to the residual stream an edit reaches, as it is shown; without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CoverageRow:
    """How many parameters that write to the residual stream are edited."""

    component: str
    reached: int
    total: int
    modules: int
    detail: str

    @property
    def share(self) -> float:
        return self.reached / self.total if self.total else 0.0


def format_coverage(rows: list[CoverageRow]) -> str:
    """A small table, last line the total."""
    reached, total = sum(row.reached for row in rows), sum(row.total for row in rows)
    lines = [f"{'component':<12} {'modules':>7} {'parameters':>15} {'reached':>8}  where"]
    lines += [f"{row.component:<12} {row.modules:>7} {row.total:>15,} {row.share:>8.1%}  {row.detail}" for row in rows]
    lines.append(f"{'total':<12} {'':>7} {total:>15,} {reached / total if total else 0:>8.1%}")
    return "\n".join(lines)
