"""What the report claims of rows: each of its own control."""

from __future__ import annotations

from recipes.routers.methods import read_known
from recipes.routers.report.section import _claims
from recipes.routers.stored_routes import Routes

KNOWN = read_known()
NOISE = KNOWN.noise


def test_rows_of_some_layers_are_compared_with_noise_in_the_same_ones():
    routes = Routes(
        names=(NOISE, "mean_field_router"),
        layers=("a", "b", "c"),
        susceptible=(1,),
        selections={"last": ("last layer", (2,)), "susceptible": ("susceptible layers", (1,))},
        active_macs=1,
        counted={},
        num_questions=1,
    )
    rows = [KNOWN.reference, NOISE, f"{NOISE}_scores", f"{NOISE}_last", "mean_field_router", "mean_field_router_scores",
            "mean_field_router_last", "mean_field_router_susceptible"]  # fmt: skip
    claims = {(bar.method, bar.others) for bar in _claims(rows, routes, KNOWN) if "untrained noise" in bar.title}
    assert claims == {
        ("mean_field_router", (NOISE,)),
        ("mean_field_router_scores", (NOISE,)),
        ("mean_field_router_last", (f"{NOISE}_last",)),
        ("mean_field_router_susceptible", (NOISE,)),  # there is none with noise in these
    }
    plain = [bar for bar in _claims(rows, routes, KNOWN) if "control" in bar.title]
    assert {(bar.method, bar.others) for bar in plain} == {
        (NOISE, (KNOWN.reference,)),
        ("mean_field_router", (KNOWN.reference,)),
    }
