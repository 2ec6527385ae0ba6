"""Templates about divisibility, remainders, bases and sequences."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from math import gcd, isqrt, lcm

from .draw import Draw, Problem, a, frac, listed, num, ordinal


def factorise(n: int) -> list[tuple[int, int]]:
    """Prime factors with exponents, smallest first."""
    found, p = [], 2
    while n > 1:
        e = 0
        while n % p == 0:
            n, e = n // p, e + 1
        if e:
            found.append((p, e))
        p += 1
    return found


def as_powers(n: int) -> str:
    """``2^3 * 5``."""
    return " * ".join(str(p) if e == 1 else f"{p}^{e}" for p, e in factorise(n))


def blinking_lights(d: Draw) -> Problem:
    what, unit = d.pick(
        ("lighthouses flash", "seconds"),
        ("bells strike", "minutes"),
        ("buses leave the square", "minutes"),
        ("machines need oil", "days"),
        ("comets return", "years"),
    )
    x, y, z = d.until(
        lambda: (d.whole(6, 30), d.whole(6, 36), d.whole(8, 45)),
        lambda v: len(set(v)) == 3 and lcm(*v) < 2_000 and lcm(*v) not in v and gcd(v[0], v[1]) > 1,
    )
    m = lcm(x, y, z)
    problem = (
        d.pick(
            f"Three {what} every {x}, {y} and {z} {unit} respectively. They have just done so together. After how many {unit} will all three coincide again?",
            f"Of three that {what.split(' ', 1)[1]}, the first does so every {x} {unit}, the second every {y} and the third every {z}. Having coincided now, when do they next coincide?",
        )
        if what != "comets return"
        else f"Three comets return to the neighbourhood of the sun every {x}, {y} and {z} years. All three are visible this year. After how many years does that happen again?"
    )
    rationale = d.pick(
        f"We need the least common multiple. {x} = {as_powers(x)}, {y} = {as_powers(y)} and {z} = {as_powers(z)}. Taking every prime in its highest power gives {as_powers(m)} = {m}, so it happens again after {m} {unit}.",
        f"Two of them, the first and the second, coincide every lcm({x}, {y}) = {x} * {y} / {gcd(x, y)} = {lcm(x, y)} {unit}. Together with the third that becomes {lcm(x, y)} * {z} / {gcd(lcm(x, y), z)} = {m} {unit}, since {gcd(lcm(x, y), z)} is the greatest common divisor of {lcm(x, y)} and {z}.",
    )
    return Problem(problem, rationale, m, {"x": x, "y": y, "z": z})


def remainders(d: Draw) -> Problem:
    p, q = d.until(lambda: (d.whole(3, 11), d.whole(4, 13)), lambda v: gcd(*v) == 1 and v[0] < v[1])
    n = d.until(lambda: d.whole(q + 1, p * q - 1), lambda k: k % p > 0 and k % q > 0)
    r, s = n % p, n % q
    tries = list(range(s, n + 1, q))
    limit = p * q
    thing, row = d.pick(
        ("soldiers", "rows"), ("plants", "rows"), ("coins", "piles"), ("biscuits", "stacks"), ("chairs", "rows")
    )
    problem = d.pick(
        f"Put into {row} of {p}, a number of {thing} leaves {r} over; put into {row} of {q}, it leaves {s} over. There are fewer than {limit}. How many {thing} are there?",
        f"Find the number below {limit} that leaves remainder {r} on division by {p} and remainder {s} on division by {q}.",
    )
    shown = ", ".join(map(str, tries)) if len(tries) <= 7 else ", ".join(map(str, tries[:4])) + ", ..., " + str(n)
    rationale = d.pick(
        f"Numbers with remainder {s} for {q} are {shown}{', ...' if len(tries) <= 7 else ''}. Going through them, {n} is the first whose remainder for {p} is {r}, because {n} = {n // p} * {p} + {r}. The next such number would be {n} + {p * q} = {n + p * q}, too large. So it is {n}.",
        f"Write n = {q}k + {s}. For k = 0, 1, 2, ... the remainders on division by {p} run through {', '.join(str(t % p) for t in range(s, s + q * min(p, 6), q))}{', ...' if p > 6 else ''}; the value {r} first appears at k = {n // q}. Thus n = {q} * {n // q} + {s} = {n}, and indeed {n} - {r} = {n - r} is divisible by {p}.",
    )
    return Problem(problem, rationale, n, {"p": p, "q": q, "r": r, "s": s})


def count_divisors(d: Draw) -> Problem:
    n = d.until(
        lambda: 2 ** d.whole(0, 4) * 3 ** d.whole(0, 3) * 5 ** d.whole(0, 2) * d.pick(1, 7, 11, 13),
        lambda v: 60 <= v <= 3_000 and len(factorise(v)) >= 2,
    )
    fs = factorise(n)
    count = 1
    for _, e in fs:
        count *= e + 1
    problem = d.pick(
        f"How many positive divisors does {n} have?",
        f"In how many ways can {n} soldiers be drawn up in equal rows, if one single row and rows of one are both allowed?",
        f"{n} square tiles are laid out as a full rectangle. How many different row lengths are possible?",
    )
    rationale = d.pick(
        f"Factorise first: {n} = {as_powers(n)}. In a divisor the exponents can be chosen freely: {listed([f'0 to {e} for {p}' for p, e in fs])}. That makes {' * '.join(str(e + 1) for _, e in fs)} = {count} divisors, and each stands for one arrangement.",
        f"Since {n} = {as_powers(n)}, add one to each exponent and multiply: {' * '.join(f'({e} + 1)' for _, e in fs)} = {count}. As the count is {'odd, the number is a perfect square' if count % 2 else 'even, the divisors fall into pairs whose product is the number'}.",
    )
    return Problem(problem, rationale, count, {"n": n})


def last_digit(d: Draw) -> Problem:
    base, exp = d.pick(2, 3, 7, 8, 12, 13, 17, 18, 22, 23, 27), d.whole(30, 400)
    cycle = []
    k = base % 10
    while k not in cycle:
        cycle.append(k)
        k = k * base % 10
    result = pow(base, exp, 10)
    r = exp % len(cycle)
    problem = d.pick(
        f"What is the last digit of {base}^{exp}?",
        f"Suppose {base} is multiplied by itself until there are {exp} factors. In which digit does the product end?",
    )
    rationale = d.pick(
        f"Only the last digit of each power matters. For {base}, {base}^2, {base}^3, ... these digits are {', '.join(map(str, cycle))} and then repeat with period {len(cycle)}. Because {exp} = {exp // len(cycle)} * {len(cycle)} + {r}, the power ends like the {'last' if r == 0 else ordinal(r)} one of the cycle, in {result}.",
        f"Powers of {base} end in {', '.join(map(str, cycle))}, {cycle[0]}, ... with a cycle of length {len(cycle)}. Divide the exponent: {exp} leaves the remainder {r} on division by {len(cycle)}, which points to the digit {result}{' at the end of the cycle' if r == 0 else ''}.",
    )
    return Problem(problem, rationale, result, {"base": base, "exp": exp})


def to_other_base(d: Draw) -> Problem:
    base, n = d.pick(2, 3, 5, 6, 7, 8, 16), d.whole(60, 900)
    digits, steps, k = [], [], n
    while k:
        steps.append(f"{k} = {k // base} * {base} + {k % base}")
        digits.append("0123456789ABCDEF"[k % base])
        k //= base
    text = "".join(reversed(digits))
    highest = base ** (len(digits) - 1)
    problem = d.pick(
        f"Write {n} in base {base}{', using A to F for the digits ten to fifteen' if base == 16 else ''}.",
        f"How is the decimal number {n} written in the numeral system with base {base}{' (digits 0 to 9, then A to F)' if base == 16 else ''}?",
    )
    back = " + ".join(f"{int(c, 16)} * {base ** (len(text) - 1 - i)}" for i, c in enumerate(text) if c != "0")
    rationale = d.pick(
        f"Divide by {base} again and again and note the remainders: {'; '.join(steps)}. Read from the last to the first they give {text}. Check: {back} = {n}.",
        f"Find the highest power first: the largest one of {base} not above {n} is {base}^{len(digits) - 1} = {highest}, so there are {len(digits)} digits. Splitting {n} into powers of {base} yields {n} = {back}, and the digits are {text}.",
    )
    return Problem(problem, rationale, text, {"base": base, "n": n})


def arithmetic_seats(d: Draw) -> Problem:
    first, step, rows = d.whole(12, 30), d.whole(2, 5), d.whole(8, 24)
    last = first + step * (rows - 1)
    total = rows * (first + last) // 2
    place = d.pick("theatre", "lecture hall", "open-air stage", "cinema", "stadium stand")
    problem = d.pick(
        f"In front, the first row of a {place} has {first} seats and every row behind has {step} more than the one before. There are {rows} rows. How many seats are in the last row, and how many in all?",
        f"A {place} has {rows} rows. Row 1 has {first} seats, row 2 has {first + step}, row 3 has {first + 2 * step}, and so on. Find the size of the last row and the number of all seats.",
    )
    rationale = d.pick(
        f"From the first to the last row the number grows {rows - 1} times by {step}: {first} + {rows - 1} * {step} = {last}. The average row has ({first} + {last}) / 2 = {num(Fraction(first + last, 2))} seats, and {rows} * {num(Fraction(first + last, 2))} = {total:,}.",
        f"Row n has {first} + {step}(n - 1) seats, so row {rows} has {first} + {step} * {rows - 1} = {last}. Pairing first with last, second with last but one, each pair holds {first} + {last} = {first + last} seats; with {num(Fraction(rows, 2))} pairs that is {num(Fraction(rows, 2))} * {first + last} = {total:,}.",
    )
    return Problem(problem, rationale, total, {"first": first, "step": step, "rows": rows, "last": last})


def geometric_growth(d: Draw) -> Problem:
    q, first, terms = d.pick((2, 3, 9), (3, 2, 6), (2, 5, 8), (4, 1, 6), (5, 2, 5), (3, 5, 6), (2, 7, 7), (10, 3, 5))
    terms = terms + d.whole(-1, 1)
    first = first + d.whole(0, 4)
    last, total = first * q ** (terms - 1), first * (q**terms - 1) // (q - 1)
    who, times = d.name(), "twice" if q == 2 else f"{q} times"
    seq = [first * q**i for i in range(3)]
    problem = d.pick(
        f"{who} tells a story to {first} people on Monday. On each following day {times} as many people hear it as on the day before. How many hear it on day {terms}, and how many have heard it by then altogether, nobody twice?",
        f"A sequence starts {seq[0]}, {seq[1]}, {seq[2]}, ..., each term being {times} the one before. What is term number {terms}, and what is the sum of the first {terms} terms?",
    )
    rationale = d.pick(
        f"Term {terms} arises after {terms - 1} multiplications by {q}: {first} * {q}^{terms - 1} = {last:,}. For the sum S, multiplying by {q} shifts the sequence, so {q}S - S = {last * q:,} - {first} = {last * q - first:,}. "
        + (
            f"Therefore S = {last * q - first:,} / {q - 1} = {total:,}."
            if q > 2
            else f"Since 2S - S is S itself, the sum is {total:,}."
        ),
        f"The numbers are {', '.join(f'{first * q**i:,}' for i in range(terms))}. The last of them is {last:,}. The sum follows from the formula {first} * ({q}^{terms} - 1) / ({q} - 1) = {total:,}, which adding them one by one confirms.",
    )
    return Problem(problem, rationale, total, {"first": first, "q": q, "terms": terms, "last": last})


def quadratic_pattern(d: Draw) -> Problem:
    p, q, r = d.whole(1, 4), d.whole(-3, 6), d.whole(0, 9)

    def term(n: int) -> int:
        return p * n * n + q * n + r

    shown = [term(n) for n in range(1, 6)]
    if min(shown) < 1:
        return quadratic_pattern(d)
    first = [y - x for x, y in itertools.pairwise(shown)]
    ask = d.whole(10, 25)

    def formula() -> str:
        middle = "" if q == 0 else f" {'+' if q > 0 else '-'} {'' if abs(q) == 1 else abs(q)}n"
        return f"{'' if p == 1 else p}n^2{middle}{f' + {r}' if r else ''}"

    source = d.pick(
        "Matches are laid into growing figures that need", "Stones are arranged in figures of", "A sequence begins with"
    )
    problem = d.pick(
        f"{source} {', '.join(map(str, shown))}, ... If the pattern is quadratic, what is the {ordinal(ask)} number?",
        f"Continue {', '.join(map(str, shown))}, ... as a quadratic sequence and find its {ordinal(ask)} term.",
    )
    rationale = d.pick(
        f"Neighbouring terms differ by {', '.join(map(str, first))} and they themselves grow by {2 * p} each time, so the rule has the form {'' if p == 1 else p}n^2 + bn + c (half of {2 * p} in front of the square). Comparing with the first two terms gives n-th term = {formula()}. For n = {ask} that is {term(ask):,}.",
        f"Second differences are constant, {first[1]} - {first[0]} = {2 * p}. The n-th term is therefore {shown[0]} + {first[0]}(n - 1) + {2 * p}(n - 1)(n - 2)/2, which simplifies to {formula()}. Putting n = {ask} gives {shown[0]} + {first[0]} * {ask - 1} + {p} * {(ask - 1) * (ask - 2)} = {term(ask):,}.",
    )
    return Problem(problem, rationale, term(ask), {"shown": shown, "ask": ask})


def digit_puzzle(d: Draw) -> Problem:
    t, u = d.until(lambda: (d.whole(1, 9), d.whole(1, 9)), lambda v: v[0] != v[1])
    n, rev = 10 * t + u, 10 * u + t
    s, diff = t + u, abs(n - rev)
    problem = d.pick(
        f"Both digits of a two-digit number add up to {s}. When they are exchanged, the number becomes {diff} {'smaller' if n > rev else 'larger'}. What is the number?",
        f"Some number with two digits has digit sum {s}. Reading it backwards gives a number that is {'less' if n > rev else 'greater'} by {diff}. Find it.",
    )
    hi, lo = max(t, u), min(t, u)
    rationale = d.pick(
        f"With tens digit t and units digit u the number is 10t + u, reversed 10u + t; the two differ by 9 times the difference of the digits. So the digits differ by {diff} / 9 = {hi - lo}. Together with their sum {s}, the larger is ({s} + {hi - lo}) / 2 = {hi} and the smaller {s} - {hi} = {lo}. Since exchanging makes it {'smaller' if n > rev else 'larger'}, the number is {n}.",
        f"Exchanging digits changes the number by 9 for every unit of difference between them. {diff} / 9 = {hi - lo}, so we look for two digits with sum {s} and difference {hi - lo}: {hi} and {lo}. The {'larger' if n > rev else 'smaller'} one comes first, {n}, and {max(n, rev)} - {min(n, rev)} = {diff} is right.",
    )
    return Problem(problem, rationale, n, {"s": s, "diff": diff, "smaller": int(n > rev)})


def consecutive_numbers(d: Draw) -> Problem:
    kind, step = d.pick(
        ("consecutive whole numbers", 1),
        ("consecutive even numbers", 2),
        ("consecutive odd numbers", 2),
        ("consecutive multiples of 5", 5),
        ("consecutive multiples of 3", 3),
    )
    count = d.whole(3, 7)
    start = d.whole(4, 60) * 2 + (1 if "odd" in kind else 0)
    if step in (3, 5):
        start = start // 2 * step
    seq = [start + i * step for i in range(count)]
    total = sum(seq)
    mid = Fraction(total, count)
    problem = d.pick(
        f"Adding {count} {kind} gives {total}. What are they?",
        f"{count} {kind} add up to {total}. Find the smallest and the largest of them.",
    )
    rationale = d.pick(
        f"Their mean is {total} / {count} = {num(mid)}, and the numbers lie evenly around it, {step} apart. The smallest is {num(mid)} - {num(Fraction(step * (count - 1), 2))} = {seq[0]} and the largest {num(mid)} + {num(Fraction(step * (count - 1), 2))} = {seq[-1]}, so they are {listed(seq)}.",
        f"If n is the smallest, the sum is {count}n + {step * count * (count - 1) // 2}. From {count}n = {total} - {step * count * (count - 1) // 2} = {count * start} follows n = {start}, and the numbers are {listed(seq)}. Their sum is {' + '.join(map(str, seq))} = {total}.",
    )
    return Problem(problem, rationale, seq[0], {"count": count, "step": step, "total": total})


def perfect_square_factor(d: Draw) -> Problem:
    n = d.until(lambda: d.whole(24, 600), lambda v: any(e % 2 for _, e in factorise(v)) and len(factorise(v)) >= 2)
    need = 1
    for p, e in factorise(n):
        need *= p if e % 2 else 1
    root = isqrt(n * need)
    odd = [str(p) for p, e in factorise(n) if e % 2]
    problem = d.pick(
        f"By which smallest whole number must {n} be multiplied to become a perfect square, and what is the root of the result?",
        f"With {n} seedlings a gardener wants to plant a full square. What is the smallest factor by which the number of seedlings would have to be multiplied, and how long is a row then?",
    )
    rationale = d.pick(
        f"In a perfect square all exponents are even. Here {n} = {as_powers(n)}, where {listed(odd)} {'has an odd exponent' if len(odd) == 1 else 'have odd exponents'}. Multiplying by {' * '.join(odd)}{f' = {need}' if len(odd) > 1 else ''} repairs that: {n} * {need} = {n * need:,} = {root}^2.",
        f"Factor the number: {n} = {as_powers(n)}. Every prime with an odd exponent is needed once more, which gives the factor {need}. Then {n} * {need} = {n * need:,}, and its root is {root}, because {root} * {root} = {root * root:,}.",
    )
    return Problem(problem, rationale, need, {"n": n, "root": root})


def egyptian_sum(d: Draw) -> Problem:
    p, q, r = d.until(
        lambda: tuple(sorted(d.sample([2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 18, 20], 3))),
        lambda v: Fraction(1, v[0]) + Fraction(1, v[1]) + Fraction(1, v[2]) < 1,
    )
    total = Fraction(1, p) + Fraction(1, q) + Fraction(1, r)
    rest = 1 - total
    whole = lcm(p, q, r) * d.whole(1, 4)
    left = whole * rest
    x, y, z = d.names(3)
    problem = d.pick(
        f"From {a(whole)}-page album {x} fills 1/{p} of the pages, {y} 1/{q} and {z} 1/{r}. Which fraction stays empty, and how many pages is that?",
        f"{x} owns 1/{p} of a herd of {whole}, {y} owns 1/{q} and {z} owns 1/{r}; the rest belongs to the village. What part is that, and how many animals?",
    )
    m = lcm(p, q, r)
    rationale = d.pick(
        f"With the common denominator {m} the three parts are {m // p}/{m}, {m // q}/{m} and {m // r}/{m}, together {m // p + m // q + m // r}/{m}{'' if gcd(m // p + m // q + m // r, m) == 1 else f' = {frac(total)}'}. What remains is 1 - {frac(total)} = {frac(rest)}, that is {whole} * {frac(rest)} = {num(left)}.",
        f"In numbers the parts are {whole} / {p} = {whole // p}, {whole} / {q} = {whole // q} and {whole} / {r} = {whole // r}. From {whole} that leaves {whole} - {whole // p} - {whole // q} - {whole // r} = {num(left)}, which is {frac(rest)} of the whole.",
    )
    return Problem(problem, rationale, rest, {"p": p, "q": q, "r": r, "whole": whole})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    blinking_lights,
    remainders,
    count_divisors,
    last_digit,
    to_other_base,
    arithmetic_seats,
    geometric_growth,
    quadratic_pattern,
    digit_puzzle,
    consecutive_numbers,
    perfect_square_factor,
    egyptian_sum,
)
