"""The mathematics of the shipped word problems, checked by other means than the generator's own.

Three ways: every numeric equation printed in a solution is evaluated again from the text; the answers of over
fifty templates are found once more by brute force or simulation; and the answer stands in the solution.
"""

from __future__ import annotations

import calendar
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction as F
from itertools import combinations, count, permutations, product
from pathlib import Path
from typing import Any

import pytest

from tools.corpora import problems
from tools.corpora.problems.draw import Draw, Problem, frac, money, num

ROOT = Path(__file__).resolve().parents[2]

SHIPPED = list(problems.problems())
_LINES = (ROOT / "data/corpora/math.jsonl").read_text(encoding="utf-8").splitlines()
TEXTS = [row["text"] for row in map(json.loads, _LINES) if row["group"].startswith("problems/")]

# --- every printed equation -------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[-+*/^()=!]|\s+|.", re.DOTALL)


class NotArithmeticError(Exception):
    """A side of an equation that is not a finished numeric expression (it holds a variable, say)."""


def evaluate(text: str) -> F:
    """Value of ``+ - * / ^ !`` over numbers by recursive descent, exactly."""
    tokens = re.findall(r"\d+(?:\.\d+)?|[-+*/^()!]", text)
    place = 0

    def peek() -> str:
        return tokens[place] if place < len(tokens) else ""

    def take() -> str:
        nonlocal place
        place += 1
        return tokens[place - 1]

    def sum_() -> F:
        value = term()
        while peek() in ("+", "-"):
            value = value + term() if take() == "+" else value - term()
        return value

    def term() -> F:
        value = power()
        while peek() in ("*", "/"):
            value = value * power() if take() == "*" else value / power()
        return value

    def power() -> F:
        if peek() == "-":
            take()
            return -power()
        value = atom()
        if peek() == "!":
            take()
            value = F(math.factorial(int(value)))
        if peek() == "^":
            take()
            value = value ** int(power())
        return value

    def atom() -> F:
        if peek() == "(":
            take()
            value = sum_()
            if peek() != ")":
                raise NotArithmeticError(text)
            take()
            return value
        if not peek() or not peek()[0].isdigit():
            raise NotArithmeticError(text)
        return F(take())

    result = sum_()
    if place != len(tokens):
        raise NotArithmeticError(text)
    return result


def equations(text: str) -> list[list[F]]:
    """Chains of equal numeric sides found in a text, as their values."""
    text = text.replace("×", "*").replace("÷", "/").replace("$", "")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    runs, run = [], ""
    for token in _TOKEN.findall(text):
        if re.fullmatch(r"\d+(?:\.\d+)?|[-+*/^()=!]|\s+", token):
            run += token
        else:
            runs.append((run, token))
            run = ""
    runs.append((run, " "))
    found = []
    for run, after in runs:
        sides = run.split("=")
        values = []
        for i, side in enumerate(sides):
            if not side.strip() or re.match(r"\s*(?:[+*/^!]|- )", side):
                continue  # the side began with a variable
            glued = i == len(sides) - 1 and (after.isalpha() or after in "%:") and not side.endswith(" ")
            if glued or (i == len(sides) - 1 and re.search(r"[-+*/^(]\s*$", side)):
                continue  # it goes on with a variable, a percent sign or a ratio
            try:
                values.append(evaluate(side))
            except NotArithmeticError:
                continue
        if len(values) > 1:
            found.append(values)
    return found


def test_the_checker_itself_finds_wrong_and_skips_unfinished_equations() -> None:
    assert equations("so 3 * $1,200.50 = $3,601.50.") == [[F("3601.5"), F("3601.5")]]
    assert equations("2 + 2 = 5") == [[F(4), F(5)]]
    assert equations("3x + 2 = 14, 1/2 - 1/3 = 1/6 and 5! / (2! * 3!) = 10") == [[F(1, 6), F(1, 6)], [F(10), F(10)]]
    assert equations("0.2 = 20% and n - 5 = 3") == []
    assert equations("9 * (-8) = -72 and 2^3^1 = 8") == [[F(-72), F(-72)], [F(8), F(8)]]


def test_every_printed_equation_holds() -> None:
    checked, with_equation = 0, 0
    for text in TEXTS:
        chains = equations(text.split("\n\n")[1])
        for values in chains:
            assert len(set(values)) == 1, f"{values} in: {text}"
            checked += len(values) - 1
        with_equation += bool(chains)
    assert checked > 1_500
    assert with_equation > 0.9 * len(TEXTS)


# --- answers found once more ------------------------------------------------------------------------------------

Facts = dict[str, Any]


def multiset_orders(word: str) -> int:
    """Number of different strings with these letters, by counting first letters recursively."""
    memo: dict[tuple[int, ...], int] = {}

    def orders(left: tuple[int, ...]) -> int:
        if sum(left) == 0:
            return 1
        if left not in memo:
            memo[left] = sum(orders((*left[:i], n - 1, *left[i + 1 :])) for i, n in enumerate(left) if n)
        return memo[left]

    return orders(tuple(Counter(word).values()))


def paths(east: int, north: int) -> int:
    return 1 if east == 0 or north == 0 else paths(east - 1, north) + paths(east, north - 1)


def first(accept: Callable[[int], bool], start: int = 0) -> int:
    return next(n for n in count(start) if accept(n))


def weeks(f: Facts) -> int:
    tin, n = f["have"], 0
    while tin < f["goal"]:
        tin, n = tin + f["weekly"] - f["spend"], n + 1
    return n


def reading_days(f: Facts) -> int:
    left, today, n = f["pages"], f["first"], 0
    while left > 0:
        left, today, n = left - today, today + f["more"], n + 1
    return n


def cube_faces(f: Facts) -> int:
    edge = (0, f["n"] - 1)
    return sum(sum(c in edge for c in cell) == f["faces"] for cell in product(range(f["n"]), repeat=3))


def pen(f: Facts) -> F:
    sides = [F(k, 4) for k in range(1, 2 * f["fence"])]
    return max(x * (f["fence"] - 2 * x) if f["three"] else x * (F(f["fence"], 2) - x) for x in sides)


def hands(f: Facts) -> F:
    apart = (F(f["h"] % 12, 12) + F(f["m"], 720) - F(f["m"], 60)) % 1 * 360
    return min(apart, 360 - apart)


def draws(f: Facts) -> F:
    pairs = list(permutations("a" * f["x"] + "b" * f["y"], 2))
    return F(sum((p[0] == p[1]) == bool(f["same"]) for p in pairs), len(pairs))


def on_the_clock(minutes: int) -> str:
    return f"{minutes // 60 % 24}:{minutes % 60:02d}"


def food(f: Facts) -> int:
    left, days = f["people"] * f["days"] - f["people"] * f["gone"], 0
    while left > 0:
        left, days = left - f["people"] - f["extra"], days + 1
    return days


def runners(f: Facts) -> str:
    same = first(lambda t: (f["v1"] - f["v2"]) * t % f["lap"] == 0, 1)
    return f"{same} s, {first(lambda t: (f['v1'] + f['v2']) * t % f['lap'] == 0, 1)} s"


def growth(f: Facts) -> F:
    balance = F(f["capital"])
    for _ in range(f["years"]):
        balance += balance * f["rate"] / 100
    return balance


def tax(f: Facts) -> F:
    top = max(0, f["income"] - f["free"] - f["band"])
    return F(top * f["r2"], 100) + F((f["income"] - f["free"] - top) * f["r1"], 100)


def common_date(f: Facts) -> str:
    start = date.fromisoformat(f["start"])
    n = first(lambda k: k % f["p"] == 0 and k % f["q"] == 0, 1)
    return f"{start + timedelta(n)}, {(start + timedelta(n)):%A}"


def weekday_in_month(f: Facts) -> str:
    start = first(lambda k: (date(2024, 1, 1) + timedelta(k)).weekday() == f["weekday"])
    then = date(2024, 1, 1) + timedelta(start + f["ask"] - f["given"] + 700)
    return f"{then:%A}, {('first', 'second', 'third', 'fourth')[(f['ask'] - 1) // 7]}"


def two_unknowns(total: int, value: int, a: int, b: int) -> tuple[int, int]:
    (x,) = [x for x in range(total + 1) if a * x + b * (total - x) == value]
    return x, total - x


def five(f: Facts) -> str:
    v = f["values"]
    mean = statistics.mean(map(F, v))
    return f"{num(mean)}, {statistics.median(v)}, {statistics.mode(v)}, {max(v) - min(v)}"


ORACLES: dict[str, Callable[[Facts], object]] = {
    "shopping_change": lambda f: f["paid"] - sum([f["ca"]] * f["na"]) - sum([f["cb"]] * f["nb"]),
    "sharing_with_remainder": lambda f: "{} each, {} left, {} more".format(
        *divmod(f["total"], f["people"]), -f["total"] % f["people"]
    ),
    "crates_needed": lambda f: len(range(0, f["total"], f["per"])),
    "saving_weeks": weeks,
    "best_offer": lambda f: abs(f["p1"] / f["q1"] - f["p2"] / f["q2"]),
    "books_read": reading_days,
    "undo_the_steps": lambda f: first(lambda s: s % 2 == 0 and s // 2 + f["gift"] - f["lost"] == f["end"]),
    "taxi_fare": lambda f: first(lambda k: f["base1"] + k * f["rate1"] == f["base2"] + k * f["rate2"]),
    "joined_ratios": lambda f: F(f["total"]) * F(f["c1"], f["b2"]) / (F(f["a1"], f["b1"]) + 1 + F(f["c1"], f["b2"])),
    "discount_then_tax": lambda f: (f["price"] - F(f["price"] * f["off"], 100)) * (1 + F(f["tax"], 100)),
    "original_price": lambda f: first(lambda p: p * (100 + (f["rate"] if f["up"] else -f["rate"])) == 100 * f["now"]),
    "mix_two_solutions": lambda f: F(f["v1"] * f["c1"] + f["v2"] * f["c2"], f["v1"] + f["v2"]),
    "dilute_with_water": lambda f: first(lambda w: F(f["v"] * f["c"], f["v"] + w) == f["t"]),
    "fraction_of_remainder": lambda f: first(lambda s: s - s * f["f1"] - (s - s * f["f1"]) * f["f2"] == f["left"], 1),
    "catching_up": lambda f: first(lambda t: f["fast"] * t == f["slow"] * (t + f["head"])),
    "average_speed": lambda f: 2 * f["dist"] / (F(f["dist"], f["v1"]) + F(f["dist"], f["v2"])),
    "work_together": lambda f: 1 / (F(1, f["x"]) + F(1, f["y"])),
    "helper_leaves": lambda f: first(lambda n: F(f["t"], f["x"]) + F(f["t"] + n, f["y"]) == 1),
    "tank_in_and_out": lambda f: first(lambda t: F(t, f["fill"]) - F(t, f["drain"]) == 1),
    "provisions": food,
    "circular_track": runners,
    "ladder_on_wall": lambda f: first(lambda h: h * h + f["foot"] ** 2 == f["z"] ** 2),
    "interior_angles": lambda f: first(lambda n: F(180 * (n - 2), n) == f["inner"], 3),
    "painted_cube": cube_faces,
    "tiles_without_cutting": lambda f: "{} cm, {} tiles".format(
        g := max(k for k in range(1, f["y"] + 1) if f["x"] % k == f["y"] % k == 0), f["x"] // g * (f["y"] // g)
    ),
    "lattice_triangle": lambda f: abs(
        F(
            (f["ax"] + f["bx"]) * (f["by"] - f["ay"])
            + (f["bx"] + f["cx"]) * (f["cy"] - f["by"])
            + (f["cx"] + f["ax"]) * (f["ay"] - f["cy"]),
            2,
        )
    ),
    "rectangles_in_grid": lambda f: sum((f["r"] - h) * (f["c"] - w) for h in range(f["r"]) for w in range(f["c"])),
    "fence_best_area": pen,
    "committee": lambda f: (
        len(list(combinations(range(f["n"]), f["i"]))) * len(list(combinations(range(f["m"]), f["j"])))
    ),
    "word_arrangements": lambda f: multiset_orders(f["word"]),
    "two_draws": draws,
    "dice_sum": lambda f: F(
        sum(a + b == f["target"] for a in range(1, f["s1"] + 1) for b in range(1, f["s2"] + 1)), f["s1"] * f["s2"]
    ),
    "at_least_one": lambda f: F(sum(0 in t for t in product(range(f["k"]), repeat=f["n"])), f["k"] ** f["n"]),
    "lattice_paths": lambda f: "{}, {}".format(
        paths(f["e"], f["n"]), paths(f["x"], f["y"]) * paths(f["e"] - f["x"], f["n"] - f["y"])
    ),
    "two_sets": lambda f: first(lambda b: f["n1"] - b + f["n2"] - b + b + f["none"] == f["total"]),
    "handshakes": lambda f: f["n"] if f["back"] else sum(1 for _ in combinations(range(f["n"]), 2)),
    "digit_numbers": lambda f: sum(p[0] != 0 for p in permutations(f["pool"], f["k"])),
    "drawers_principle": lambda f: sum(min(c, f["k"] - 1) for c in f["counts"]) + 1,
    "expected_win": lambda f: F(f["big"] * f["pb"] + f["small"] * f["ps"], f["tickets"]) - f["price"],
    "blinking_lights": lambda f: first(lambda t: t % f["x"] == t % f["y"] == t % f["z"] == 0, 1),
    "remainders": lambda f: first(lambda n: n % f["p"] == f["r"] and n % f["q"] == f["s"]),
    "count_divisors": lambda f: sum(f["n"] % k == 0 for k in range(1, f["n"] + 1)),
    "last_digit": lambda f: int(str(f["base"] ** f["exp"])[-1]),
    "arithmetic_seats": lambda f: sum(f["first"] + f["step"] * i for i in range(f["rows"])),
    "geometric_growth": lambda f: sum(f["first"] * f["q"] ** i for i in range(f["terms"])),
    "digit_puzzle": lambda f: next(
        n
        for n in range(10, 100)
        if sum(map(int, str(n))) == f["s"] and (n - int(str(n)[::-1])) == (f["diff"] if f["smaller"] else -f["diff"])
    ),
    "consecutive_numbers": lambda f: first(lambda n: sum(n + f["step"] * i for i in range(f["count"])) == f["total"]),
    "perfect_square_factor": lambda f: first(lambda k: math.isqrt(f["n"] * k) ** 2 == f["n"] * k, 1),
    "egyptian_sum": lambda f: 1 - F(1, f["p"]) - F(1, f["q"]) - F(1, f["r"]),
    "missing_score": lambda f: first(lambda s: statistics.mean(map(F, [*f["scores"], s])) == f["goal"]),
    "five_numbers": five,
    "combined_mean": lambda f: statistics.mean([f["m1"]] * f["n1"] + [f["m2"]] * f["n2"]),
    "compound_interest": growth,
    "salary_tax": tax,
    "ticket_sales": lambda f: "{} adults, {} children".format(*two_unknowns(f["total"], f["income"], f["pa"], f["pc"])),
    "sum_and_product": lambda f: next(f"{x} and {f['s'] - x}" for x in range(f["s"]) if x * (f["s"] - x) == f["p"]),
    "falling_stone": lambda f: first(lambda t: f["h"] + f["v"] * t - 5 * t * t == 0, 1),
    "day_of_week": lambda f: f"{date(2024, 1, 1) + timedelta(f['start'] + f['n']):%A}",
    "days_between": lambda f: (date(f["year"], f["m2"], f["d2"]) - date(f["year"], f["m1"], f["d1"])).days,
    "month_weekday": weekday_in_month,
    "timetable": lambda f: on_the_clock(f["start"] + f["first"] + f["wait"] + f["second"]),
    "clock_angle": hands,
    "slow_clock": lambda f: on_the_clock(
        f["start"] * 60 + f["hours"] * (60 + (f["rate"] if f["fast"] else -f["rate"]))
    ),
    "leap_years": lambda f: sum(map(calendar.isleap, range(f["first"], f["last"] + 1))),
    "shift_calendar": common_date,
}


def test_oracles_name_templates_and_cover_most_of_them() -> None:
    assert set(ORACLES) <= set(problems.templates())
    assert len(problems.templates()) >= 60
    assert len(ORACLES) >= 0.6 * len(problems.templates())


@pytest.mark.parametrize("template", sorted(ORACLES))
def test_answer_found_by_other_means(template: str) -> None:
    shipped = [problem for name, _, problem in SHIPPED if name == template]
    assert shipped
    fresh = [problems.templates()[template](Draw(f"fresh/{template}/{i}")) for i in range(8)]
    for problem in [*shipped, *fresh]:
        assert ORACLES[template](problem.facts) == problem.answer, problem.problem


def written(problem: Problem) -> list[str]:
    """The ways an answer may be written in its solution."""
    if isinstance(problem.answer, str):
        return re.findall(r"\d[\d,.]*\d|\d|[A-Z][a-z]+day", problem.answer)
    value = abs(F(problem.answer))
    ways = [num(value), frac(value), str(value)]
    if (value * 100).denominator == 1:
        ways.append(money(value))
    return ways


def test_the_answer_stands_in_the_solution() -> None:
    for name, text, problem in SHIPPED:
        if name in ("shift_calendar", "to_other_base"):  # a date in words; digits checked below
            continue
        solution = text.split("\n\n")[1]
        plain = solution.replace(",", "")
        ways = [way.replace(",", "") for way in written(problem)]
        hits = [re.search(rf"(?<![\d.]){re.escape(way)}(?![\d]|\.\d)", plain) for way in ways]
        assert all(hits) if isinstance(problem.answer, str) else any(hits), (name, problem.answer, solution)


def test_digits_in_other_bases_read_back() -> None:
    found = [problem for name, _, problem in SHIPPED if name == "to_other_base"]
    for problem in found:
        assert int(str(problem.answer), int(str(problem.facts["base"]))) == problem.facts["n"]
        assert str(problem.answer) in problem.rationale


@pytest.mark.parametrize("template", sorted(problems.templates()))
def test_a_template_varies(template: str) -> None:
    texts = [text for name, text, _ in SHIPPED if name == template]
    assert len(texts) >= 3
    skeletons = {
        re.sub(r"[\d.,]+|\b[A-Z]\w+", "_", problem.problem)
        for problem in (problems.templates()[template](Draw(f"vary/{template}/{i}")) for i in range(12))
    }
    assert len(skeletons) >= 2
