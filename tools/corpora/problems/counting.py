"""Templates about counting and probability."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, gcd, perm

from .draw import Draw, Problem, frac, listed, num, plural


def committee(d: Draw) -> Problem:
    g1, g2 = d.pick(
        ("teachers", "parents"),
        ("engineers", "designers"),
        ("violinists", "cellists"),
        ("sailors", "cooks"),
        ("botanists", "geologists"),
    )
    n, m, i, j = d.until(
        lambda: (d.whole(4, 10), d.whole(4, 9), d.whole(2, 4), d.whole(1, 3)), lambda v: v[2] < v[0] and v[3] < v[1]
    )
    x, y = comb(n, i), comb(m, j)
    problem = d.pick(
        f"From {n} {g1} and {m} {g2} a group of {i} {g1} and {plural(j, g2[:-1])} is to be formed. In how many ways can that be done?",
        f"How many different teams with {i} {g1} and {plural(j, g2[:-1])} can be put together out of {n} {g1} and {m} {g2}?",
    )

    def ways(total: int, chosen: int) -> str:
        top = " * ".join(str(total - k) for k in range(chosen))
        return f"{top} / {factorial(chosen)} = {comb(total, chosen)}" if chosen > 1 else f"{total}"

    rationale = d.pick(
        f"Order does not matter. The {g1} can be chosen in {ways(n, i)} ways and the {g2} in {ways(m, j)}. Every choice of the one goes with every choice of the other, so there are {x} * {y} = {x * y:,} possibilities.",
        f"Multiply the two independent choices. C({n}, {i}): {ways(n, i)}. C({m}, {j}): {ways(m, j)}. The product {x} * {y} = {x * y:,} counts the groups.",
    )
    return Problem(problem, rationale, x * y, {"n": n, "m": m, "i": i, "j": j})


def word_arrangements(d: Draw) -> Problem:
    word = d.pick(
        "BANANA",
        "LETTER",
        "PEPPER",
        "LEVEL",
        "COFFEE",
        "MINIMUM",
        "BALLOON",
        "TATTOO",
        "SUCCESS",
        "COMMON",
        "ARRANGE",
        "KAYAK",
        "BOOKKEEPER",
        "RECEIVER",
        "CARAVAN",
    )
    counts = {c: k for c, k in sorted(Counter(word).items()) if k > 1}
    n = len(word)
    div = 1
    for k in counts.values():
        div *= factorial(k)
    total = factorial(n) // div
    reps = listed([f"{c} {'twice' if k == 2 else f'{k} times'}" for c, k in counts.items()])
    factors = " * ".join(f"{k}!" for k in counts.values())
    problem = d.pick(
        f"In how many different orders can the letters of {word} be written?",
        f"Letter blocks on a sign painter's bench spell {word}. How many distinguishable strings of all {n} blocks exist?",
        f"How many anagrams, meaningful or not and counting the word itself, does {word} have?",
    )
    values = " * ".join(str(factorial(k)) for k in counts.values())
    rationale = d.pick(
        f"If all {n} letters were different there would be {n}! = {factorial(n):,} orders. But the word has {reps}, and swapping equal letters changes nothing, so each string is counted {factors} times, which is {values}{f' = {div}' if '*' in values else ''}. The number sought is {factorial(n):,} / {div} = {total:,}.",
        f"Repeated letters are what matters: {reps}. Dividing {n}! = {factorial(n):,} by {factors}, that is by {div}, removes the arrangements that look the same: {factorial(n):,} / {div} = {total:,}.",
    )
    return Problem(problem, rationale, total, {"word": word})


def two_draws(d: Draw) -> Problem:
    c1, c2 = d.sample(["red", "white", "green", "yellow", "black", "blue"], 2)
    x, y = d.whole(3, 12), d.whole(3, 12)
    thing, box = d.pick(("balls", "an urn"), ("socks", "a drawer"), ("counters", "a bag"), ("beads", "a tin"))
    n = x + y
    total = n * (n - 1)
    same = Fraction(x * (x - 1) + y * (y - 1), total)
    diff = 1 - same
    want, p = d.pick(("the same colour", same), ("different colours", diff))
    problem = d.pick(
        f"In {box} there are {x} {c1} and {y} {c2} {thing}. Two are taken out at random without putting the first one back. How likely are they to have {want}?",
        f"Without looking, somebody takes two {thing} from {box} that holds {x} {c1} and {y} {c2} ones. Find the probability that they have {want}.",
    )
    if want == "the same colour":
        rationale = d.pick(
            f"There are {n} * {n - 1} = {total} ordered pairs. Both {c1}: {x} * {x - 1} = {x * (x - 1)}; both {c2}: {y} * {y - 1} = {y * (y - 1)}. The probability is ({x * (x - 1)} + {y * (y - 1)}) / {total} = {frac(same)}.",
            f"Both {c1} has probability {x}/{n} * {x - 1}/{n - 1} = {frac(Fraction(x * (x - 1), total))}, both {c2} has {y}/{n} * {y - 1}/{n - 1} = {frac(Fraction(y * (y - 1), total))}. Adding the two cases gives {frac(same)}.",
        )
    else:
        rationale = d.pick(
            f"There are {n} * {n - 1} = {total} ordered pairs. {c1.capitalize()} first and {c2} second makes {x} * {y} = {x * y} of them, {c2} first and {c1} second as many. So the probability is 2 * {x * y} / {total} = {frac(diff)}.",
            f"Subtract the chance of equal colours. {x}/{n} * {x - 1}/{n - 1} = {frac(Fraction(x * (x - 1), total))} for {c1} and {y}/{n} * {y - 1}/{n - 1} = {frac(Fraction(y * (y - 1), total))} for {c2}; together {frac(same)}. What remains is 1 - {frac(same)} = {frac(diff)}.",
        )
    return Problem(problem, rationale, p, {"x": x, "y": y, "same": int(want == "the same colour")})


def dice_sum(d: Draw) -> Problem:
    s1, s2 = d.pick((6, 6), (6, 8), (4, 6), (8, 8), (6, 10), (4, 8), (6, 12), (10, 10))
    target = d.whole(4, s1 + s2 - 3)
    pairs = [(i, target - i) for i in range(1, s1 + 1) if 1 <= target - i <= s2]
    p = Fraction(len(pairs), s1 * s2)
    dice = f"two fair dice with {s1} faces each" if s1 == s2 else f"a fair die with {s1} faces and another with {s2}"
    problem = d.pick(
        f"Somebody throws {dice}, numbered from 1. What is the probability that the numbers add up to {target}?",
        f"With {dice} (numbered from 1 upwards), how likely is a total of exactly {target}?",
    )
    rationale = d.pick(
        f"All {s1} * {s2} = {s1 * s2} pairs are equally likely. A total of {target} arises from {', '.join(f'({i}, {j})' for i, j in pairs)}: {plural(len(pairs), 'pair')}. Therefore the probability is {len(pairs)}/{s1 * s2}{'' if gcd(len(pairs), s1 * s2) == 1 else f' = {frac(p)}'}.",
        f"If the first die shows i, the second must show {target} - i, which has to lie between 1 and {s2}. That allows i from {pairs[0][0]} to {pairs[-1][0]}, {plural(len(pairs), 'value')} in all, out of {s1 * s2} possible pairs. The probability is {frac(p)}.",
    )
    return Problem(problem, rationale, p, {"s1": s1, "s2": s2, "target": target})


def at_least_one(d: Draw) -> Problem:
    who = d.name()
    what, k, n = d.pick(
        ("throws a die with 6 faces {n} times. How likely is at least one six?", 6, d.whole(2, 5)),
        (
            "picks a card from a full deck of 52, puts it back and shuffles, {n} times in all. What is the probability of seeing at least one heart?",
            4,
            d.whole(2, 5),
        ),
        (
            "spins a wheel with {k} equal fields, one of them winning, {n} times. Find the probability of winning at least once.",
            d.whole(5, 9),
            d.whole(2, 4),
        ),
        (
            "guesses {n} questions that offer {k} answers each, one of them right. How likely is at least one correct guess?",
            d.whole(3, 5),
            d.whole(2, 5),
        ),
    )
    none = Fraction(k - 1, k) ** n
    p = 1 - none
    problem = f"{who} {what.format(n=n, k=k)}"
    chain = " * ".join([f"{k - 1}/{k}"] * n)
    rationale = d.pick(
        f"It is easier to find the chance that it never happens. One attempt fails with probability {k - 1}/{k}, and {n} independent attempts all fail with {chain} = {frac(none)}. So at least one succeeds with probability 1 - {frac(none)} = {frac(p)}.",
        f"Of the {k}^{n} = {k**n:,} equally likely outcomes, {k - 1}^{n} = {(k - 1) ** n:,} contain no success. The remaining {k**n:,} - {(k - 1) ** n:,} = {k**n - (k - 1) ** n:,} contain one or more, which is a share of {frac(p)}.",
    )
    return Problem(problem, rationale, p, {"k": k, "n": n})


def lattice_paths(d: Draw) -> Problem:
    e, n = d.whole(3, 7), d.whole(2, 6)
    x, y = d.whole(1, e - 1), d.whole(1, n - 1)
    total, via = comb(e + n, n), comb(x + y, y) * comb(e + n - x - y, n - y)
    who = d.name()
    shop = d.pick("bakery", "post office", "kiosk", "library")
    problem = d.pick(
        f"{who} walks to school through a grid of streets, {e} blocks east and {n} blocks north, never going back. How many routes are there, and how many of them pass the {shop} that lies {plural(x, 'block')} east and {plural(y, 'block')} north of home?",
        f"In a town with a square grid of streets {who} goes {plural(e, 'block')} east and {plural(n, 'block')} north by a shortest way. Count the possible ways, and those that lead past the {shop}, {x} east and {y} north of the start.",
    )
    rationale = d.pick(
        f"A route is a string of {e + n} moves of which {n} go north, so there are C({e + n}, {n}) = {total}. To pass the {shop}, first make {x + y} moves with {y} north, C({x + y}, {y}) = {comb(x + y, y)}, then {e + n - x - y} moves with {n - y} north, C({e + n - x - y}, {n - y}) = {comb(e + n - x - y, n - y)}. That makes {comb(x + y, y)} * {comb(e + n - x - y, n - y)} = {via} routes.",
        f"Choosing which of the {e + n} steps go north gives {e + n}! / ({e}! * {n}!) = {total} ways. Up to the {shop} there are {comb(x + y, y)}, from there on {comb(e + n - x - y, n - y)}, and every first part fits every second part: {comb(x + y, y)} * {comb(e + n - x - y, n - y)} = {via}.",
    )
    return Problem(problem, rationale, f"{total}, {via}", {"e": e, "n": n, "x": x, "y": y, "total": total, "via": via})


def two_sets(d: Draw) -> Problem:
    x, y = d.pick(
        ("tennis", "swimming"), ("French", "Spanish"), ("tea", "coffee"), ("cats", "dogs"), ("painting", "pottery")
    )
    verb = {"tennis": "like", "French": "learn", "tea": "drink", "cats": "keep", "painting": "practise"}[x]
    only1, only2, both, none = d.whole(8, 60), d.whole(8, 60), d.whole(5, 30), d.whole(3, 25)
    n1, n2, total = only1 + both, only2 + both, only1 + only2 + both + none
    problem = d.pick(
        f"Of {total} people asked, {n1} {verb} {x}, {n2} {verb} {y} and {none} {verb} neither. How many {verb} both, and how many only {x}?",
        f"In a survey of {total} persons {none} {verb} neither {x} nor {y}; {n1} {verb} {x} and {n2} {verb} {y}. Find the number who {verb} both and the number who {verb} {x} only.",
    )
    rationale = d.pick(
        f"At least one of the two applies to {total} - {none} = {total - none} people. Adding {n1} + {n2} = {n1 + n2} counts those with both twice, so both applies to {n1 + n2} - {total - none} = {both}. Only {x}: {n1} - {both} = {only1}.",
        f"Let b be the number for both. Then {n1} + {n2} - b + {none} = {total}, hence b = {n1} + {n2} + {none} - {total} = {both}. Without them, {n1} - {both} = {only1} people {verb} {x} only, and {n2} - {both} = {only2} {verb} {y} only.",
    )
    return Problem(problem, rationale, both, {"n1": n1, "n2": n2, "none": none, "total": total})


def handshakes(d: Draw) -> Problem:
    n = d.whole(7, 40)
    total = comb(n, 2)
    setting, act, pair = d.pick(
        ("At a reunion every guest shakes hands once with every other guest", "handshakes", "guests"),
        ("In a chess league each player meets every other player once", "games", "players"),
        ("Every town of a county is linked to every other by a direct bus line", "lines", "towns"),
        ("At the end of term each pupil swaps a photograph with every other pupil", "swaps", "pupils"),
    )
    back = d.pick(True, False)
    problem = (
        f"{setting}. Altogether there are {total} {act}. How many {pair} are there?"
        if back
        else f"{setting}. There are {n} {pair}. How many {act} does that make?"
    )
    rationale = (
        f"With n {pair} there are n(n - 1)/2 {act}, because each of the n pairs up with n - 1 others and every pair is counted twice. From n(n - 1) = 2 * {total} = {2 * total} we look for two neighbouring whole numbers with this product: {n} * {n - 1} = {2 * total}. So there are {n} {pair}."
        if back
        else d.pick(
            f"Each of the {n} {pair} is involved {n - 1} times, which would give {n} * {n - 1} = {n * (n - 1)}, but each of the {act} involves two and was counted twice: {n * (n - 1)} / 2 = {total}.",
            f"Line the {pair} up. The first has {n - 1} partners, the second {n - 2} new ones, and so on down to 1. The sum 1 + 2 + ... + {n - 1} is {n - 1} * {n} / 2 = {total}.",
        )
    )
    return Problem(problem, rationale, n if back else total, {"n": n, "total": total, "back": int(back)})


def digit_numbers(d: Draw) -> Problem:
    digits = sorted(d.sample(list(range(1, 10)), d.whole(4, 6)))
    zero = d.pick(True, False)
    pool = ([0, *digits]) if zero else digits
    k, n = d.pick(3, 4), len(pool)
    total = (n - 1) * perm(n - 1, k - 1) if zero else perm(n, k)
    chain = [n - 1, *range(n - 1, n - k, -1)] if zero else list(range(n, n - k, -1))
    product = " * ".join(map(str, chain))
    problem = d.pick(
        f"How many {k}-digit numbers with different digits can be formed from the digits {listed(pool)}?",
        f"Some lock shows {k}-digit numbers that do not begin with 0. Only the digits {listed(pool)} are used, each at most once. How many settings are there?",
    )
    rationale = (
        f"In first place 0 is not allowed, which leaves {n - 1} choices. After that 0 is allowed again, while the digit already used is not, so there are again {n - 1} choices for the second place, and one fewer for every further place. Altogether {product} = {total}."
        if zero
        else f"For the first place there are {n} digits to choose from, and each further place has one fewer, because no digit may be repeated. That makes {product} = {total} numbers."
    )
    return Problem(problem, rationale, total, {"pool": pool, "k": k})


def expected_win(d: Draw) -> Problem:
    who, fair = d.name(), d.pick("a village fair", "a charity evening", "a school fête", "a club raffle")
    tickets = d.whole(2, 10) * 50
    big, small = d.whole(1, 3), d.whole(5, 20)
    pb, ps = d.whole(40, 120, 10), d.whole(2, 12)
    price = d.whole(2, 5)
    payout = big * pb + small * ps
    mean = Fraction(payout, tickets)
    if (mean * 100).denominator != 1:
        return expected_win(d)
    loss = price - mean
    problem = d.pick(
        f"At {fair} {tickets} tickets are sold at ${price}. There {'is' if big == 1 else 'are'} {plural(big, 'prize')} of ${pb} and {small} of ${ps}. What can {who}, who buys one ticket, expect to win on average, and how does that compare with the price?",
        f"{tickets} tickets at ${price} each go on sale for {fair}; {plural(big, 'ticket')} {'wins' if big == 1 else 'win'} ${pb} and {small} win ${ps}. Find the expected gain or loss of {who} with a single ticket.",
    )
    rationale = d.pick(
        f"All prizes together are worth {big} * {pb} + {small} * {ps} = {payout} dollars. Spread over {tickets} tickets that is {payout} / {tickets} = {num(mean)} dollars a ticket. Compared with the price, {price} - {num(mean)} = {num(loss)}, so on average a ticket {'loses' if loss > 0 else 'gains'} {num(abs(loss))} dollars.",
        f"The expected winnings are {pb} * {big}/{tickets} + {ps} * {small}/{tickets} = {num(mean)} dollars. Since the ticket costs {price} dollars, the expected result is {num(mean)} - {price} = {num(-loss)} dollars.",
    )
    return Problem(
        problem, rationale, -loss, {"tickets": tickets, "big": big, "small": small, "pb": pb, "ps": ps, "price": price}
    )


def drawers_principle(d: Draw) -> Problem:
    colours = d.sample(["black", "white", "grey", "brown", "navy", "red", "green"], d.whole(3, 5))
    thing = d.pick("socks", "gloves that fit either hand", "counters", "candles")
    k = d.whole(2, 6)
    counts = [d.whole(k + 1, 20) for _ in colours]
    need = len(colours) * (k - 1) + 1
    word = thing.split()[0]
    problem = d.pick(
        f"Inside a box there are {listed([f'{n} {c}' for n, c in zip(counts, colours, strict=True)])} {thing}. In the dark, how many must be taken to be sure of {k} of one colour?",
        f"{sum(counts)} {thing} lie mixed in a chest: {listed([f'{n} {c}' for n, c in zip(counts, colours, strict=True)])}. What is the smallest number that certainly includes {k} of the same colour, whatever the luck?",
    )
    rationale = d.pick(
        f"In the worst case one gets {k - 1} of each of the {len(colours)} colours before any colour reaches {k}. That is {len(colours)} * {k - 1} = {need - 1} {word}. The next one must complete a set, so {need - 1} + 1 = {need} are needed and enough.",
        f"With {need - 1} {word} it could happen that every one of the {len(colours)} colours appears exactly {k - 1} times, because {len(colours)} * {k - 1} = {need - 1}. With one more, some colour has to appear at least {k} times by the pigeonhole principle. The answer is {need}; how many of each colour there are plays no part as long as there are at least {k}.",
    )
    return Problem(problem, rationale, need, {"colours": len(colours), "k": k, "counts": counts})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    committee,
    word_arrangements,
    two_draws,
    dice_sum,
    at_least_one,
    lattice_paths,
    two_sets,
    handshakes,
    digit_numbers,
    expected_win,
    drawers_principle,
)
