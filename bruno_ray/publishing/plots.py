"""The pictures of the report, as plotly figures. Those of single parameters are Optuna's, in the report's dress.

A function returns None where there is too little to draw; the report then says so.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import optuna
import plotly.graph_objects as go
from optuna.trial import TrialState
from plotly.subplots import make_subplots

from bruno_ray.publishing import wording
from bruno_ray.study import selection
from bruno_ray.study.selection import TrialRecord
from bruno_ray.study.tables import describe_trial, metric_text

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TARGET, BASELINE, ACCENT, INK, GRID = "#c2410c", "#2563eb", "#0f766e", "#1f2937", "#e5e7eb"
COMPONENTS = (TARGET, BASELINE, ACCENT, "#7c3aed", "#0891b2", "#be185d")

PANELS = 24
"""At most this many stream points get a picture."""

PROMPTS_DRAWN = 200
"""At most this many prompts per side are drawn."""

FEWEST_FOR_IMPORTANCE = 8
"""With fewer trials importances are noise."""


def dressed(figure: go.Figure, height: int = 420) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        title=None,
        height=height,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font_size": 12},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#9ca3af", "activecolor": INK},
    )
    return figure


# ----- the study -----


def pareto_front(trials: Sequence[TrialRecord], objectives: Sequence[str], selected: int | None) -> go.Figure | None:
    """All trials over the first two or three objectives; the selected one is ringed.

    With more than three objectives a trial of the front may look dominated in the picture.
    """
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    axes = list(objectives[:3])
    if not complete or len(axes) < 2:
        return None
    best = {trial.number for trial in selection.pareto_front(trials, objectives)}
    size = 1.0 if len(axes) == 2 else 0.6
    groups = (
        ("dominated", [t for t in complete if t.number not in best], {"color": "#cbd5e1", "size": 8 * size}),
        ("Pareto front", [t for t in complete if t.number in best], {"color": ACCENT, "size": 10 * size}),
        (
            f"selected: trial {selected}",
            [t for t in complete if t.number == selected],
            {"color": TARGET, "size": 18 * size, "symbol": "circle-open", "line": {"width": 3, "color": TARGET}},
        ),
    )
    figure = go.Figure()
    for name, group, marker in groups:
        if not group:
            continue
        place = dict(zip("xyz", ([trial.values[axis] for trial in group] for axis in axes)))
        text = [_hover(trial, objectives) for trial in group]
        kind = go.Scatter if len(axes) == 2 else go.Scatter3d
        figure.add_trace(kind(**place, mode="markers", name=name, marker=marker, text=text, hoverinfo="text"))
    names = [axis_name(axis) for axis in axes]
    if len(axes) == 2:
        figure.update_xaxes(title=names[0])
        figure.update_yaxes(title=names[1])
    else:
        figure.update_scenes({f"{letter}axis": {"title": name} for letter, name in zip("xyz", names)})
    figure.update_layout(legend={"orientation": "h", "y": 1.1, "x": 0}, showlegend=True)
    if len(axes) == 2:
        return dressed(figure, 440)
    return dressed(figure, 600).update_layout(
        margin={"l": 0, "r": 0, "b": 20}, scene_camera_eye={"x": 1.7, "y": 1.7, "z": 0.9}
    )


def _hover(trial: TrialRecord, objectives: Sequence[str]) -> str:
    lines = [f"<b>trial {trial.number}</b>"]
    lines += [f"{wording.label(name)}: {metric_text(trial, name)}" for name in objectives]
    return "<br>".join([*lines, describe_trial(trial)])


def history(trials: Sequence[TrialRecord], objectives: Sequence[str]) -> go.Figure | None:
    """Value of every trial by number, one row per objective, with the best so far."""
    complete = [trial for trial in trials if trial.state == "COMPLETE"]
    if not complete:
        return None
    figure = make_subplots(rows=len(objectives), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    numbers = [trial.number for trial in complete]
    for row, objective in enumerate(objectives, start=1):
        values = [trial.values[objective] for trial in complete]
        best = list(accumulate(values, min))
        dots = {"color": "#94a3b8", "size": 6}
        line = {"color": ACCENT, "width": 2, "shape": "hv"}
        first = row == 1
        figure.add_trace(
            go.Scatter(x=numbers, y=values, mode="markers", name="trial", marker=dots, showlegend=first), row=row, col=1
        )
        figure.add_trace(
            go.Scatter(x=numbers, y=best, mode="lines", name="best so far", line=line, showlegend=first), row=row, col=1
        )
        figure.update_yaxes(title=axis_name(objective), row=row, col=1)
    figure.update_xaxes(title="Trial", row=len(objectives), col=1)
    figure.update_layout(legend={"orientation": "h", "y": 1 + 0.22 / len(objectives), "x": 0})
    return dressed(figure, 90 + 210 * len(objectives))


def importances(study: optuna.Study, objectives: Sequence[str]) -> go.Figure | None:
    """How much of an objective's good values each parameter explains (PED-ANOVA, Watanabe et al. 2023)."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return None
    figure = go.Figure()
    for i, objective in enumerate(objectives):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that low values are sought is what we want
            shares = optuna.importance.get_param_importances(study, target=lambda trial, i=i: trial.values[i])
        names = list(reversed(shares))
        figure.add_trace(
            go.Bar(
                y=names,
                x=[shares[name] for name in names],
                orientation="h",
                name=axis_name(objective),
                marker_color=COMPONENTS[i % len(COMPONENTS)],
            )
        )
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.08, "x": 0})
    figure.update_xaxes(title="Importance")
    figure.update_yaxes(automargin=True)
    return dressed(figure, 120 + 34 * len(complete[0].params))


def slices(study: optuna.Study, objective: int, name: str) -> go.Figure | None:
    """One objective over each parameter; colour is the trial number."""
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    single = optuna.visualization.plot_slice(
        study, target=lambda trial: trial.values[objective], target_name=axis_name(name)
    )
    traces, columns = list(single.data), 3
    rows = -(-len(traces) // columns)
    figure = make_subplots(rows=rows, cols=columns, shared_yaxes=True, vertical_spacing=0.34 / max(rows, 1))
    titles = [axis.title.text for axis in single.select_xaxes()]
    for i, trace in enumerate(traces):
        row, col = i // columns + 1, i % columns + 1
        trace.marker.update(showscale=False, size=5, colorscale="Teal", line={"width": 0})
        trace.update(xaxis=None, yaxis=None, showlegend=False)
        figure.add_trace(trace, row=row, col=col)
        figure.update_xaxes(title=titles[i], row=row, col=col)
        if col == 1:
            figure.update_yaxes(title=axis_name(name), row=row, col=col)
    figure.update_xaxes(title_font_size=12, title_standoff=4, tickangle=0, tickfont_size=11)
    return dressed(figure, 60 + 250 * rows)


def parallel(study: optuna.Study, objective: int, name: str) -> go.Figure | None:
    """Parallel coordinates of all parameters, coloured by one objective."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 2:
        return None
    figure = optuna.visualization.plot_parallel_coordinate(
        study, target=lambda trial: trial.values[objective], target_name=axis_name(name)
    )
    if not figure.data:
        return None
    return dressed(figure, 460)


# ----- the edit -----


def kernels(edit: dict[str, Any], n_layers: int) -> go.Figure:
    """Ablation strength of every component over the layers."""
    from bruno_ray.ablation.edit import Edit

    parsed = Edit.from_dict(edit)
    figure = go.Figure()
    for color, component in zip(COMPONENTS, parsed.components):
        strengths = [parsed.strength(component, layer) for layer in range(n_layers)]
        figure.add_trace(
            go.Scatter(
                x=list(range(n_layers)), y=strengths, mode="lines+markers", name=component, line={"color": color}
            )
        )
    figure.add_hline(y=1, line={"color": "#9ca3af", "dash": "dot", "width": 1})
    figure.update_xaxes(title="Layer")
    figure.update_yaxes(title="Ablation strength", rangemode="tozero")
    figure.update_layout(legend={"orientation": "h", "y": 1.1, "x": 0})
    return dressed(figure, 300)


# ----- residual geometry -----


def geometry_record(
    target_NLD: "Float[Tensor, 'n_target point d_model']", baseline_MLD: "Float[Tensor, 'n_baseline point d_model']"
) -> dict[str, Any]:
    """What the report draws of the residuals, as plain numbers for geometry.json.

    `points` has one row of figures per stream point, over all prompts; `planes` the coordinates in the plane of the
    two leading principal components for up to PANELS points and PROMPTS_DRAWN prompts per side.
    """
    from bruno_ray.residuals.geometry import point_geometry, principal_plane

    points = [asdict(row) for row in point_geometry(target_NLD, baseline_MLD)]
    shown = evenly_spaced(target_NLD.shape[1], PANELS)
    plane = principal_plane(target_NLD[:PROMPTS_DRAWN, shown], baseline_MLD[:PROMPTS_DRAWN, shown])
    planes = []
    for i, point in enumerate(shown):
        planes.append(
            {
                "point": point,
                "target": _rounded(plane.target_NL2[:, i].tolist()),
                "baseline": _rounded(plane.baseline_ML2[:, i].tolist()),
                "explained": _rounded([plane.explained_L2[i].tolist()])[0],
            }
        )
    return {
        "points": [{key: _short(value) for key, value in row.items()} for row in points],
        "planes": planes,
        "n_target": len(target_NLD),
        "n_baseline": len(baseline_MLD),
    }


def evenly_spaced(n: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers 0 to n - 1, first and last included."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def planes(geometry: dict[str, Any]) -> go.Figure | None:
    """Small multiples: target and baseline prompts in the principal plane, one panel per stream point."""
    panels = geometry["planes"]
    if not panels:
        return None
    columns = min(len(panels), 6)
    rows = -(-len(panels) // columns)
    titles = [
        f"{point_name(panel['point'])}<br><sub>{100 * sum(panel['explained']):.0f} % of variance</sub>"
        for panel in panels
    ]
    figure = make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, horizontal_spacing=0.015, vertical_spacing=0.3 / (rows + 1)
    )
    for i, panel in enumerate(panels):
        for side, color in (("baseline", BASELINE), ("target", TARGET)):
            xs, ys = zip(*panel[side]) if panel[side] else ((), ())
            figure.add_trace(
                go.Scatter(
                    x=xs,
                    y=ys,
                    mode="markers",
                    name=side,
                    legendgroup=side,
                    showlegend=i == 0,
                    marker={"size": 4, "color": color, "opacity": 0.55},
                    hoverinfo="skip",
                ),
                row=i // columns + 1,
                col=i % columns + 1,
            )
    figure.update_xaxes(
        showticklabels=False, zeroline=False, showgrid=False, mirror=True, linecolor=GRID, showline=True
    )
    figure.update_yaxes(
        showticklabels=False, zeroline=False, showgrid=False, mirror=True, linecolor=GRID, showline=True
    )
    figure.update_annotations(font_size=12)
    figure = dressed(figure, 70 + 185 * rows)
    return figure.update_layout(
        margin={"l": 10, "r": 10, "t": 80, "b": 10},
        legend={"orientation": "h", "y": 1 + 0.5 / rows, "x": 0, "itemsizing": "constant"},
    )


def separation(geometry: dict[str, Any]) -> go.Figure:
    """AUROC, cosine and silhouette over the stream points."""
    rows = geometry["points"]
    figure = go.Figure()
    curves = (
        ("auroc", "AUROC", ACCENT),
        ("cosine", "cosine of the means", BASELINE),
        ("silhouette", "silhouette", TARGET),
    )
    for key, name, color in curves:
        figure.add_trace(
            go.Scatter(
                x=[row["point"] for row in rows],
                y=[row[key] for row in rows],
                mode="lines+markers",
                name=name,
                line={"color": color},
                marker={"size": 5},
            )
        )
    figure.update_xaxes(title="Stream point (0: embedding, l + 1: after layer l)")
    figure.update_layout(legend={"orientation": "h", "y": 1.12, "x": 0})
    return dressed(figure, 300)


def axis_name(metric: str) -> str:
    return metric.replace("_", " ").replace("kl ", "KL ")


def point_name(point: int) -> str:
    return "embedding" if point == 0 else f"after layer {point - 1}"


def _short(value: float) -> float:
    """Four significant digits: enough for a picture, and a fifth of the bytes."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _rounded(pairs: list[list[float]]) -> list[list[float]]:
    return [[_short(value) for value in pair] for pair in pairs]
