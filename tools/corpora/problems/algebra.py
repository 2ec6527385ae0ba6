"""Templates about ages, equations and small systems."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt

from .draw import Draw, Problem, frac, money, num, plural


def ages_multiple(d: Draw) -> Problem:
    one, two = d.names(2)
    young, k, t = d.whole(3, 14), d.whole(3, 6), d.whole(2, 20)
    old = young * k
    m = Fraction(old + t, young + t)
    if m.denominator != 1 or m < 2:
        return ages_multiple(d)
    word = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}[int(m)]
    problem = d.pick(
        f"{one} is {k} times as old as {two}. In {t} years {one} will be {word} as old as {two}. How old are they now?",
        f"At present {two}'s age goes {k} times into {one}'s, and {t} years from now {one} will be {word} {two}'s age. Find both ages.",
    )
    n = int(m)
    rationale = (
        d.pick(
            f"If {two} is y years old, {one} is {k}y. In {t} years: {k}y + {t} = {n}(y + {t}), so {k}y - {n}y = {n * t} - {t}, and therefore y = {n * t - t} / {k - n} = {young}. {one} is {k} * {young} = {old}.",
            f"The difference of the ages never changes. Now it is {k - 1} times {two}'s age; in {t} years it will be {n - 1 if n > 2 else 'once'}{' times' if n > 2 else ''} that age. So {k - 1}y = {n - 1}(y + {t}), giving y = {(n - 1) * t} / {k - n} = {young}, while {one} is {old}.",
        )
        .replace(" 1(y", " (y")
        .replace("= 1(y", "= (y")
    )
    return Problem(problem, rationale, f"{old} and {young}", {"k": k, "t": t, "n": n, "young": young})


def ages_sum(d: Draw) -> Problem:
    x, y, z = d.names(3)
    c, gap, k = d.whole(4, 15), d.whole(2, 9), d.whole(2, 4)
    mid, old = c + gap, k * c
    total = c + mid + old
    problem = d.pick(
        f"{x}, {y} and {z} are {total} years old together. {y} is {gap} years older than {z}, and {x} is {k} times as old as {z}. How old is each?",
        f"Three relatives, {x}, {y} and {z}, share {total} years between them. {z} is {gap} years younger than {y}, and {x}'s age is {k} times {z}'s. Determine the ages.",
    )
    rationale = d.pick(
        f"Call {z}'s age z. Then {y} is z + {gap} and {x} is {k}z, with sum {k + 2}z + {gap} = {total}. So {k + 2}z = {total} - {gap} = {total - gap}, z = {total - gap} / {k + 2} = {c}. {z} is {c}, {y} is {c} + {gap} = {mid} and {x} is {k} * {c} = {old}.",
        f"Take away the {gap} years by which {y} is ahead: {total} - {gap} = {total - gap}. This is {z}'s age counted once for {z}, once for {y} and {k} times for {x}, {k + 2} times in all. Hence {z} is {total - gap} / {k + 2} = {c}, {y} is {mid}, {x} is {old}.",
    )
    return Problem(problem, rationale, f"{old}, {mid}, {c}", {"total": total, "gap": gap, "k": k, "z": c})


def ticket_sales(d: Draw) -> Problem:
    event = d.pick("a concert", "a football match", "a puppet show", "the zoo", "a ferry trip")
    pa, pc = d.until(lambda: (d.whole(8, 20), d.whole(3, 12)), lambda v: v[0] > v[1])
    x, y = d.whole(20, 160), d.whole(20, 160)
    total, money_in = x + y, x * pa + y * pc
    problem = d.pick(
        f"For {event} adults pay ${pa} and children ${pc}. {total} tickets brought in ${money_in:,}. How many of each kind were sold?",
        f"Takings for {event} were ${money_in:,} from {total} visitors. An adult ticket costs ${pa}, a child's ticket ${pc}. Find the numbers of adults and of children.",
    )
    rationale = d.pick(
        f"With a adults and c children, a + c = {total} and {pa}a + {pc}c = {money_in:,}. Put c = {total} - a into the second: {pa}a + {pc * total:,} - {pc}a = {money_in:,}, so {pa - pc}a = {money_in - pc * total:,} and a = {x}. Then c = {total} - {x} = {y}.",
        f"Had all {total} been children, {total} * {pc} = {total * pc:,} dollars would have come in. The missing {money_in:,} - {total * pc:,} = {money_in - total * pc:,} dollars are due to the adults, each paying {pa} - {pc} = {pa - pc} more: {money_in - total * pc:,} / {pa - pc} = {x} adults and {total} - {x} = {y} children.",
    ).replace(" 1a ", " a ")
    return Problem(
        problem,
        rationale,
        f"{x} adults, {y} children",
        {"pa": pa, "pc": pc, "total": total, "income": money_in, "x": x},
    )


def two_baskets(d: Draw) -> Problem:
    p, q = d.sample(["apples", "pears", "lemons", "peaches", "mangoes", "coconuts"], 2)
    x, y = d.until(lambda: (d.whole(20, 150, 5), d.whole(20, 150, 5)), lambda v: v[0] != v[1])
    i, j, k, m = d.until(
        lambda: (d.whole(2, 7), d.whole(2, 7), d.whole(2, 7), d.whole(2, 7)),
        lambda v: v[0] * v[3] != v[1] * v[2] and v[0] != v[2],
    )
    t1, t2 = i * x + j * y, k * x + m * y
    det = i * m - j * k
    problem = d.pick(
        f"{i} {p} and {j} {q} cost {money(Fraction(t1, 100))}; {k} {p} and {m} {q} cost {money(Fraction(t2, 100))}. What do one of the {p} and one of the {q} cost?",
        f"At a stall, one customer pays {money(Fraction(t1, 100))} for {i} {p} and {j} {q}. The next takes {k} {p} and {m} {q} for {money(Fraction(t2, 100))}. Work out both prices.",
    )
    rationale = d.pick(
        f"In cents, {i}x + {j}y = {t1} and {k}x + {m}y = {t2}. Multiply the first by {m} and the second by {j}: {i * m}x + {j * m}y = {t1 * m} and {k * j}x + {j * m}y = {t2 * j}. Subtracting, {det}x = {t1 * m - t2 * j}, so x = {x}. Then {j}y = {t1} - {i} * {x} = {j * y} and y = {y}. The prices are {money(Fraction(x, 100))} and {money(Fraction(y, 100))}.",
        f"Let x and y be the prices in cents. From the second purchase, {m}y = {t2} - {k}x; from the first, {j}y = {t1} - {i}x. Multiplying so that both have {j * m}y on the left gives {t2 * j} - {k * j}x = {t1 * m} - {i * m}x, hence {det}x = {t1 * m - t2 * j}. Thus x = {x}, and y = ({t1} - {i * x}) / {j} = {y}: {money(Fraction(x, 100))} and {money(Fraction(y, 100))}.",
    )
    return Problem(
        problem, rationale, f"{x} and {y} cents", {"i": i, "j": j, "k": k, "m": m, "t1": t1, "t2": t2, "x": x, "y": y}
    )


def rectangle_quadratic(d: Draw) -> Problem:
    w, gap = d.whole(3, 24), d.whole(2, 12)
    length = w + gap
    area = w * length
    what = d.pick("plot of land", "poster", "raft", "dance floor", "flag")
    half = Fraction(gap, 2)
    disc = Fraction(gap * gap, 4) + area
    problem = d.pick(
        f"A rectangular {what} is {gap} units longer than it is wide and has an area of {area} square units. What are its sides?",
        f"Suppose the area of a {what} is {area} and its length exceeds its width by {gap}. Find length and width.",
    )
    rationale = d.pick(
        f"With width w we have w(w + {gap}) = {area}. Completing the square, (w + {num(half)})^2 = {area} + {num(half * half)} = {num(disc)}, and the positive root is w + {num(half)} = {num(w + half)}. So the width is {w} and the length {w} + {gap} = {length}.",
        f"Multiplied out, the equation is w^2 + {gap}w - {area} = 0. Two numbers with product -{area} and sum {gap} are {length} and -{w}, so it factors as (w + {length})(w - {w}) = 0. Only w = {w} is positive, and the length is {length}. Indeed {w} * {length} = {area}.",
    )
    return Problem(problem, rationale, f"{length} by {w}", {"gap": gap, "area": area, "w": w})


def sum_and_product(d: Draw) -> Problem:
    x, y = d.until(lambda: (d.whole(3, 30), d.whole(3, 30)), lambda v: v[0] < v[1])
    s, p = x + y, x * y
    disc = s * s - 4 * p
    squares = x * x + y * y
    problem = d.pick(
        f"Two numbers have the sum {s} and the product {p}. What are they, and what is the sum of their squares?",
        f"Find two numbers that add up to {s} and multiply to {p}. Compute also the sum of their squares.",
    )
    rationale = d.pick(
        f"First the square of the difference: it is {s}^2 - 4 * {p} = {disc}, so the numbers differ by {isqrt(disc)}. They are ({s} + {isqrt(disc)}) / 2 = {y} and ({s} - {isqrt(disc)}) / 2 = {x}. For the squares, {s}^2 - 2 * {p} = {squares}.",
        f"They are the roots of t^2 - {s}t + {p} = 0. Because {x} + {y} = {s} and {x} * {y} = {p}, this is (t - {x})(t - {y}) = 0. Their squares give {x}^2 + {y}^2 = {squares}.",
    )
    return Problem(problem, rationale, f"{x} and {y}", {"s": s, "p": p, "x": x, "y": y})


def falling_stone(d: Draw) -> Problem:
    v, h = d.until(
        lambda: (d.whole(5, 40, 5), d.whole(10, 120, 5)),
        lambda w: (
            isqrt(w[0] ** 2 + 20 * w[1]) ** 2 == w[0] ** 2 + 20 * w[1]
            and (w[0] + isqrt(w[0] ** 2 + 20 * w[1])) % 10 == 0
        ),
    )
    root = isqrt(v * v + 20 * h)
    t = (v + root) // 10
    top = Fraction(v * v, 20)
    problem = d.pick(
        f"From the edge of a cliff {h} m above the sea a stone is thrown straight up at {v} m/s. Its height after t seconds is {h} + {v}t - 5t^2 metres. When does it hit the water, and how high did it get?",
        f"Thrown upwards from a tower, a ball has the height (in metres) {h} + {v}t - 5t^2 after t seconds. Find the moment it reaches the ground and its greatest height.",
    )
    rationale = d.pick(
        f"At the end the height is zero: 5t^2 - {v}t - {h} = 0. The formula gives t = ({v} + {root}) / 10 = {t}, where {root} is the root of {v}^2 + 20 * {h} = {root * root}; the other solution is negative. The highest point is reached at t = {v} / 10 = {num(Fraction(v, 10))}, and there the height is {h} + {v}^2 / 20 = {num(h + top)} m.",
        f"Rising ends at t = {num(Fraction(v, 10))} s, where the height is {h} + {num(top)} = {num(h + top)} m, the maximum. From there it falls {num(h + top)} m, which takes s seconds with 5s^2 = {num(h + top)}, so s = {num(Fraction(root, 10))}. Altogether {num(Fraction(v, 10))} + {num(Fraction(root, 10))} = {t} seconds pass.",
    )
    return Problem(problem, rationale, t, {"v": v, "h": h})


def inverse_square(d: Draw) -> Problem:
    law, x, y, unit = d.pick(
        ("The brightness of a lamp falls off with the square of the distance", "brightness", "distance", "m"),
        (
            "The force between two magnets, in a rough model, falls off with the square of their distance",
            "force",
            "distance",
            "cm",
        ),
        (
            "The loudness measured from a small source decreases with the square of the distance",
            "reading",
            "distance",
            "m",
        ),
    )
    d1, d2 = d.until(lambda: (d.whole(2, 12), d.whole(2, 12)), lambda v: v[0] != v[1])
    base = d2 * d2 * d.whole(1, 9)
    result = Fraction(base * d1 * d1, d2 * d2)
    problem = d.pick(
        f"{law}. At {d1} {unit} the {x} is {base}. What is it at {d2} {unit}?",
        f"{law}. If the {x} is {base} at a {y} of {d1} {unit}, which {x} is found at {d2} {unit}?",
    )
    rationale = d.pick(
        f"What stays constant is the product of {x} and squared {y}: {base} * {d1}^2 = {base * d1 * d1:,}. Dividing by {d2}^2 = {d2 * d2} gives {base * d1 * d1:,} / {d2 * d2} = {num(result)}.",
        f"Here the {y} changes by the factor {d2}/{d1}{'' if Fraction(d2, d1) == Fraction(d2, 1) / d1 and frac(Fraction(d2, d1)) == f'{d2}/{d1}' else f' = {frac(Fraction(d2, d1))}'}, so the {x} changes by the inverse of its square, {frac(Fraction(d1 * d1, d2 * d2))}. That makes {base} * {frac(Fraction(d1 * d1, d2 * d2))} = {num(result)}.",
    )
    return Problem(problem, rationale, result, {"base": base, "d1": d1, "d2": d2})


def custom_operation(d: Draw) -> Problem:
    p, q = d.whole(2, 6), d.whole(2, 6)
    sign = d.pick("#", "@", "&", "~")
    x, y, z = d.whole(2, 9), d.whole(2, 9), d.whole(2, 9)

    def op(u: int, v: int) -> int:
        return p * u + u * v - q * v

    inner, result = op(x, y), op(op(x, y), z)
    other = op(x, op(y, z))
    same = "so here the brackets make no difference" if result == other else "so the position of the brackets matters"
    problem = d.pick(
        f"For whole numbers a and b let a {sign} b mean {p}a + ab - {q}b. Compute ({x} {sign} {y}) {sign} {z} and {x} {sign} ({y} {sign} {z}).",
        f"An operation is defined by a {sign} b = {p}a + ab - {q}b. Is ({x} {sign} {y}) {sign} {z} equal to {x} {sign} ({y} {sign} {z})?",
    )
    second = op(y, z)
    rationale = d.pick(
        f"Inside the first bracket: {p} * {x} + {x} * {y} - {q} * {y} = {inner}. Then {p} * ({inner}) + ({inner}) * {z} - {q} * {z} = {result}. For the other order, {p} * {y} + {y} * {z} - {q} * {z} = {second}, and {p} * {x} + {x} * ({second}) - {q} * ({second}) = {other}. The values are {result} and {other}, {same}.",
        f"{x} {sign} {y} is {p * x} + {x * y} - {q * y} = {inner}, and applying the operation to that and {z} gives {result}. Starting on the right, {y} {sign} {z} is {p * y} + {y * z} - {q * z} = {second}; from {x} and this number we get {p * x} + ({x * second}) - ({q * second}) = {other}. One is {result}, the other {other}, {same}.",
    )
    return Problem(
        problem,
        rationale,
        f"{result} and {other}",
        {"p": p, "q": q, "x": x, "y": y, "z": z, "result": result, "other": other},
    )


def phone_plans(d: Draw) -> Problem:
    who = d.name()
    f1, f2, r1 = d.whole(5, 15), d.whole(18, 35), d.whole(12, 30)
    r2 = d.whole(2, r1 - 6)
    cross = Fraction((f2 - f1) * 100, r1 - r2)
    if cross.denominator != 1:
        return phone_plans(d)
    use = int(cross) + d.pick(-1, 1) * d.whole(1, int(cross) // 10 + 1) * 5
    if use <= 0:
        return phone_plans(d)
    c1, c2 = Fraction(f1 * 100 + r1 * use, 100), Fraction(f2 * 100 + r2 * use, 100)
    if c1 == c2:
        return phone_plans(d)
    better = "first" if c1 < c2 else "second"
    thing, unit = d.pick(
        ("phone plan", "minute"),
        ("photocopier contract", "copy"),
        ("bicycle-hire card", "kilometre"),
        ("scooter pass", "minute"),
    )
    many = {"copy": "copies"}.get(unit, unit + "s")
    problem = d.pick(
        f"One {thing} costs ${f1} a month and {r1} cents per {unit}; another costs ${f2} a month and {r2} cents per {unit}. Which is cheaper for {who}, who needs {use} {many} a month, and from how many {many} on is the second the better one?",
        f"{who} compares two offers for a {thing}: ${f1} plus {r1} cents a {unit}, or ${f2} plus {r2} cents a {unit}. Decide for {use} {many} a month and find where the costs are equal.",
    )
    rationale = d.pick(
        f"For {use} {many} the first costs {f1} + {use} * {num(Fraction(r1, 100))} = {num(c1)} and the second {f2} + {use} * {num(Fraction(r2, 100))} = {num(c2)} dollars, so the {better} is cheaper. They are equal when the {r1} - {r2} = {r1 - r2} cents saved on each {unit} make up for the {f2} - {f1} = {f2 - f1} dollars: {(f2 - f1) * 100} / {r1 - r2} = {num(cross)} {many}. Above that the second is better.",
        f"Equal costs mean {f1 * 100} + {r1}n = {f2 * 100} + {r2}n in cents, so {r1 - r2}n = {(f2 - f1) * 100} and n = {num(cross)}. As {use} is {'below' if use < cross else 'above'} this, {who} should take the {better}: {money(c1)} against {money(c2)}, a difference of {money(abs(c1 - c2))}.",
    )
    return Problem(problem, rationale, cross, {"f1": f1, "f2": f2, "r1": r1, "r2": r2, "use": use})


def pieces_of_rope(d: Draw) -> Problem:
    short, k, extra = d.whole(4, 25), d.whole(2, 4), d.whole(1, 9)
    mid, long = short + extra, k * short
    total = short + mid + long
    what = d.pick("rope", "wire", "plank", "ribbon", "pipe")
    problem = d.pick(
        f"Someone cuts {total} m of {what} in three. The second piece is {plural(extra, 'metre')} longer than the first, and the third is {k} times the first. How long are the pieces?",
        f"Cutting a {what} of {total} m gives three parts: a short one, one that is {extra} m longer, and one {k} times as long as the short one. What do they measure?",
    )
    rationale = d.pick(
        f"If the first is s, the three are s, s + {extra} and {k}s, together {k + 2}s + {extra} = {total}. Then s = ({total} - {extra}) / {k + 2} = {short}. The pieces are {short} m, {short} + {extra} = {mid} m and {k} * {short} = {long} m.",
        f"Cut {extra} m off the second piece in thought; what is left, {total} - {extra} = {total - extra} m, is {k + 2} times the first piece. So the first is {total - extra} / {k + 2} = {short} m, the second {mid} m and the third {long} m, and {short} + {mid} + {long} = {total} as it should be.",
    )
    return Problem(
        problem, rationale, f"{short}, {mid}, {long}", {"total": total, "extra": extra, "k": k, "short": short}
    )


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    ages_multiple,
    ages_sum,
    ticket_sales,
    two_baskets,
    rectangle_quadratic,
    sum_and_product,
    falling_stone,
    inverse_square,
    custom_operation,
    phone_plans,
    pieces_of_rope,
)
