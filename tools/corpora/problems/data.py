"""Templates about averages, spread, tables and interest."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from .draw import Draw, Problem, frac, listed, money, num


def missing_score(d: Draw) -> Problem:
    who, n = d.name(), d.whole(4, 6)
    scores = [d.whole(55, 95) for _ in range(n)]
    goal = d.until(lambda: d.whole(60, 92), lambda g: 40 <= g * (n + 1) - sum(scores) <= 100)
    need = goal * (n + 1) - sum(scores)
    what = d.pick("tests", "rounds of a quiz", "judged dives", "practice exams")
    problem = d.pick(
        f"In {n} {what} {who} has scored {listed(scores)}. What score in the next one brings the average to {goal}?",
        f"{who}'s results so far are {listed(scores)} ({n} {what}). To finish with a mean of {goal} after one more, how many points are needed?",
    )
    rationale = d.pick(
        f"So far there are {' + '.join(map(str, scores))} = {sum(scores)} points. A mean of {goal} over {n + 1} results requires {n + 1} * {goal} = {goal * (n + 1)} points. The difference, {goal * (n + 1)} - {sum(scores)} = {need}, is what the next score must be.",
        f"Measure each score from {goal}: the deviations are {', '.join(f'{s - goal:+d}' for s in scores)}, with sum {sum(scores) - n * goal:+d}. The last result has to balance this, so it must be {goal} {'+' if need >= goal else '-'} {abs(need - goal)} = {need}.",
    )
    return Problem(problem, rationale, need, {"scores": scores, "goal": goal})


def five_numbers(d: Draw) -> Problem:
    n = d.pick(5, 7, 9)
    values = [d.whole(3, 40) for _ in range(n)]
    values[d.whole(1, n - 1)] = values[0]
    srt = sorted(values)
    if max(values.count(v) for v in values) > 2 or len(set(values)) != n - 1:
        return five_numbers(d)
    mean, median, mode, rng = Fraction(sum(values), n), srt[n // 2], values[0], srt[-1] - srt[0]
    if mean.denominator > 1:
        return five_numbers(d)
    what, unit = d.pick(
        ("Daily catches of a fishing boat", "fish"),
        ("The ages of the members of a band", "years"),
        ("Waiting times at a counter", "minutes"),
        ("Rainfall on successive days", "mm"),
        ("Eggs collected each morning", "eggs"),
    )
    problem = d.pick(
        f"{what} were recorded as {listed(values)} {unit}. Find the mean, the median, the mode and the range.",
        f"{what}: {', '.join(map(str, values))} ({unit}). What are mean, median, mode and range of these data?",
    )
    rationale = d.pick(
        f"In order the values are {', '.join(map(str, srt))}. The one in the middle, {median}, is the median; only {mode} occurs twice, so it is the mode; the range is {srt[-1]} - {srt[0]} = {rng}. The sum is {sum(values)}, hence the mean is {sum(values)} / {n} = {num(mean)}.",
        f"Mean: {' + '.join(map(str, values))} = {sum(values)}, and {sum(values)} / {n} = {num(mean)}. For the median sort the list, {', '.join(map(str, srt))}, and take number {n // 2 + 1}: {median}. The mode is the repeated value {mode}, and largest minus smallest gives {srt[-1]} - {srt[0]} = {rng}.",
    )
    return Problem(
        problem,
        rationale,
        f"{num(mean)}, {median}, {mode}, {rng}",
        {"values": values, "mean": mean, "median": median, "mode": mode, "range": rng},
    )


def combined_mean(d: Draw) -> Problem:
    x, y = d.pick(("morning", "evening"), ("first", "second"), ("junior", "senior"), ("red", "blue"))
    what, unit = d.pick(
        ("class", "points"), ("team", "cm of height"), ("shift", "parts an hour"), ("group", "books a year")
    )
    n1, n2, m1, m2 = d.until(
        lambda: (d.whole(8, 32), d.whole(8, 32), d.whole(20, 90), d.whole(20, 90)),
        lambda v: v[0] != v[1] and v[2] != v[3] and (v[0] * v[2] + v[1] * v[3]) % (v[0] + v[1]) == 0,
    )
    if unit == "cm of height":
        m1, m2 = m1 + 100, m2 + 100
    mean = (n1 * m1 + n2 * m2) // (n1 + n2)
    problem = d.pick(
        f"All {n1} people of the {x} {what} average {m1} {unit}, the {n2} of the {y} {what} average {m2}. What is the average of all of them?",
        f"Two {what}{'es' if what == 'class' else 's'} are compared: {x}, {n1} people, mean {m1} {unit}; {y}, {n2} people, mean {m2}. Find the overall mean.",
    )
    rationale = d.pick(
        f"Totals first: {n1} * {m1} = {n1 * m1:,} and {n2} * {m2} = {n2 * m2:,}. Together {n1 * m1 + n2 * m2:,} spread over {n1} + {n2} = {n1 + n2} people, so the mean is {n1 * m1 + n2 * m2:,} / {n1 + n2} = {mean}. The plain average of {m1} and {m2} would ignore that the numbers of people differ.",
        f"Start from {m1}. The {n2} people of the other {what} differ from it by {m2} - {m1} = {m2 - m1} each, {n2} * ({m2 - m1}) = {n2 * (m2 - m1)} in sum. Shared among all {n1 + n2} that is {n2 * (m2 - m1)} / {n1 + n2} = {mean - m1}, so the common mean is {m1} + ({mean - m1}) = {mean}.",
    )
    return Problem(problem, rationale, mean, {"n1": n1, "n2": n2, "m1": m1, "m2": m2})


def mean_changes(d: Draw) -> Problem:
    n, mean, change = d.whole(5, 24), d.whole(20, 70), d.pick(-2, -1, 1, 2)
    joins = d.pick(True, False)
    new_n = n + 1 if joins else n - 1
    other = new_n * (mean + change) - n * mean if joins else n * mean - new_n * (mean + change)
    if not 15 <= other <= 95:
        return mean_changes(d)
    group = d.pick("choir", "hiking club", "sewing circle", "amateur theatre", "rowing crew")
    verb = "joins" if joins else "leaves"
    problem = d.pick(
        f"At present the {n} members of a {group} have a mean age of {mean}. When one person {verb}, the mean {'rises' if change > 0 else 'falls'} to {mean + change}. How old is that person?",
        f"Some {group} of {n} has an average age of {mean} years; after somebody {verb} it is {mean + change}. Work out the age of the person who {verb}.",
    )
    rationale = d.pick(
        f"Before, the ages add up to {n} * {mean} = {n * mean}; afterwards to {new_n} * {mean + change} = {new_n * (mean + change)}. The difference belongs to the person who {verb}: {max(n * mean, new_n * (mean + change))} - {min(n * mean, new_n * (mean + change))} = {other} years.",
        f"A person aged {mean} would not alter the mean. The change of {abs(change)} for each of the {new_n} people now counted makes {new_n} * {abs(change)} = {new_n * abs(change)} years, so the age is {mean} {'+' if other >= mean else '-'} {abs(other - mean)} = {other}.",
    )
    return Problem(problem, rationale, other, {"n": n, "mean": mean, "change": change, "joins": int(joins)})


def simple_interest(d: Draw) -> Problem:
    who, capital, rate, months = d.name(), d.whole(4, 40) * 300, d.whole(2, 9), d.pick(3, 4, 5, 6, 8, 9, 10, 15, 18)
    interest = Fraction(capital * rate * months, 1200)
    mode = d.pick("interest", "rate")
    if (interest * 100).denominator != 1:
        return simple_interest(d)
    problem = (
        f"{who} lends ${capital:,} for {months} months at {rate}% simple interest a year. How much interest is due, and how much comes back in all?"
        if mode == "interest"
        else f"For ${capital:,}, lent for {months} months, {who} receives {money(interest)} of simple interest. What was the yearly rate?"
    )
    year = Fraction(capital * rate, 100)
    rationale = (
        d.pick(
            f"A full year would bring {capital:,} * {rate} / 100 = {num(year)} dollars. For {months} months it is {num(year)} * {months} / 12 = {num(interest)}. With the capital, {capital:,} + {num(interest)} = {num(capital + interest)}, so {money(capital + interest)} comes back.",
            f"One month earns {num(year)} / 12 dollars, because a year earns {rate}% of {capital:,}, that is {num(year)}. In {months} months this becomes {num(year)} * {months} / 12 = {num(interest)}, the interest in dollars, and what is repaid is {money(capital + interest)}.",
        )
        if mode == "interest"
        else f"Interest of {num(interest)} dollars in {months} months corresponds to {num(interest)} * 12 / {months} = {num(year)} in a year. As a share of the capital that is {num(year)} / {capital:,} = {num(Fraction(rate, 100))}, so the rate was {rate}% a year."
    )
    return Problem(
        problem,
        rationale,
        interest if mode == "interest" else rate,
        {"capital": capital, "rate": rate, "months": months},
    )


def compound_interest(d: Draw) -> Problem:
    who, capital, rate, years = d.name(), d.whole(1, 9) * 2000, d.pick(2, 4, 5, 10), d.whole(2, 3)
    steps = [Fraction(capital)]
    for _ in range(years):
        steps.append(steps[-1] * Fraction(100 + rate, 100))
    if (steps[-1] * 100).denominator != 1:
        return compound_interest(d)
    simple = Fraction(capital * rate * years, 100)
    extra = steps[-1] - capital - simple
    factor = num(Fraction(100 + rate, 100))
    problem = d.pick(
        f"{who} deposits ${capital:,} at {rate}% interest a year, which is added to the account every year. What is the balance after {years} years, and how much of it is interest on interest?",
        f"Suppose ${capital:,} grow by {rate}% every year for {years} years. Find its final value, and by how much it exceeds what simple interest would give {who}.",
    )
    chain = "; ".join(f"after year {i}: {num(steps[i - 1])} * {factor} = {num(steps[i])}" for i in range(1, years + 1))
    rationale = d.pick(
        f"Each year multiplies the balance by {factor}. {chain[0].upper() + chain[1:]}. Simple interest would be {years} * {num(Fraction(capital * rate, 100))} = {num(simple)}, which makes {num(capital + simple)}. The surplus is {num(steps[-1])} - {num(capital + simple)} = {num(extra)}, or {money(extra)}.",
        f"In the end there are {capital:,} * {factor}^{years} = {num(steps[-1])}. Without interest on interest there would be {capital:,} + {num(simple)} = {num(capital + simple)}, so compounding contributes {money(extra)}.",
    )
    return Problem(problem, rationale, steps[-1], {"capital": capital, "rate": rate, "years": years})


def instalments(d: Draw) -> Problem:
    who, thing = d.name(), d.pick("a washing machine", "a laptop", "a sofa", "a piano", "a lawn mower")
    price, n = d.whole(24, 90) * 10, d.pick(6, 9, 10, 12, 15)
    deposit = d.whole(5, 12) * 10
    monthly = (price - deposit) // n + d.whole(2, 6)
    total = deposit + n * monthly
    extra = total - price
    share = Fraction(extra, price)
    problem = d.pick(
        f"{who} can buy {thing} for ${price} in cash, or pay ${deposit} down and then {n} monthly instalments of ${monthly}. How much more does the second way cost, and what fraction of the cash price is that?",
        f"Bought for cash, {thing} costs ${price}. On credit {who} would pay a deposit of ${deposit} and ${monthly} a month for {n} months. Compare the two.",
    )
    rationale = d.pick(
        f"Added up, the instalments come to {n} * {monthly} = {n * monthly} dollars, with the deposit {n * monthly} + {deposit} = {total}. That is {total} - {price} = {extra} dollars above the cash price, or {frac(share)} of it.",
        f"On credit the sum is {deposit} + {n} * {monthly} = {total} dollars against {price} in cash. Credit costs {extra} dollars extra; divided by {price} that makes {frac(share)} of the price.",
    )
    return Problem(problem, rationale, extra, {"price": price, "n": n, "deposit": deposit, "monthly": monthly})


def profit_percent(d: Draw) -> Problem:
    who, thing = d.name(), d.pick("melons", "vases", "sunhats", "lamps", "kites", "umbrellas")
    n, cost, broken, rate = d.until(
        lambda: (d.whole(4, 20) * 5, d.whole(2, 20), d.whole(2, 10), d.pick(10, 20, 25, 30, 40, 50)),
        lambda v: (v[0] * v[1] * (100 + v[3])) % (v[0] - v[2]) == 0,
    )
    spent = n * cost
    revenue = Fraction(spent * (100 + rate), 100)
    price = revenue / (n - broken)
    if (price * 100).denominator != 1:
        return profit_percent(d)
    problem = d.pick(
        f"{who} buys {n} {thing} at ${cost} each, but {broken} turn out to be unsaleable. At what price must each of the others be sold to make a profit of {rate}% on the money spent?",
        f"Of {n} {thing} bought for ${cost} apiece, {broken} are damaged and thrown away. Which selling price for the rest gives {who} a gain of {rate}% on the outlay?",
    )
    rationale = d.pick(
        f"{who} lays out {n} * {cost} = {spent} dollars. With {rate}% profit the takings must be {spent} * {num(Fraction(100 + rate, 100))} = {num(revenue)}. They come from {n} - {broken} = {n - broken} pieces, so each costs {num(revenue)} / {n - broken} = {num(price)}, that is {money(price)}.",
        f"{n} pieces for {spent} dollars; wanted is {money(revenue)} back (${spent} plus {money(revenue - spent)} profit). Only {n - broken} can be sold, which means {num(revenue)} / {n - broken} = {num(price)}, so {money(price)} each.",
    )
    return Problem(problem, rationale, price, {"n": n, "cost": cost, "broken": broken, "rate": rate})


def salary_tax(d: Draw) -> Problem:
    who, land = (
        d.name(),
        d.pick("In a certain country", "On an island republic", "In a small principality", "Under an old tariff"),
    )
    free, band, r1, r2 = d.whole(4, 12) * 1000, d.whole(10, 30) * 1000, d.pick(10, 15, 20), d.pick(25, 30, 40)
    income = free + band + d.whole(3, 30) * 1000
    t1, t2 = band * r1 // 100, (income - free - band) * r2 // 100
    total = t1 + t2
    problem = d.pick(
        f"{land} the first ${free:,} of income are free of tax, the next ${band:,} are taxed at {r1}% and everything above at {r2}%. {who} earns ${income:,}. How much tax is due, and what is left?",
        f"{land} income tax works in bands: nothing on the first ${free:,}, {r1}% on the following ${band:,}, {r2}% on the rest. Compute the tax of {who}, whose income is ${income:,}, and the net income.",
    )
    rationale = d.pick(
        f"The middle band costs {band:,} * {r1} / 100 = {t1:,}. Above {free:,} + {band:,} = {free + band:,} there are {income:,} - {free + band:,} = {income - free - band:,}, taxed with {income - free - band:,} * {r2} / 100 = {t2:,}. In all {t1:,} + {t2:,} = {total:,} dollars are due and {income:,} - {total:,} = {income - total:,} are left.",
        f"Split the income: {free:,} untaxed, {band:,} at {r1}% and {income - free - band:,} at {r2}%. The taxes are 0, {t1:,} and {t2:,}, together {total:,} dollars. So {who} keeps {income:,} - {total:,} = {income - total:,} dollars. The higher rate touches only the part in the upper band.",
    )
    return Problem(problem, rationale, total, {"free": free, "band": band, "r1": r1, "r2": r2, "income": income})


def electricity_meter(d: Draw) -> Problem:
    who, device = (
        d.name(),
        d.pick(
            ("heater", 1500), ("freezer", 120), ("set of lamps", 240), ("pump", 750), ("oven", 2000), ("television", 80)
        ),
    )
    name, watts = device
    hours, days, cents = d.whole(2, 12), d.pick(7, 14, 28, 30, 60), d.whole(18, 45)
    kwh = Fraction(watts * hours * days, 1000)
    cost = kwh * cents / 100
    if (cost * 100).denominator != 1:
        return electricity_meter(d)
    problem = d.pick(
        f"{who}'s {name} takes {watts:,} watts and runs {hours} hours a day. One kilowatt-hour costs {cents} cents. What does it cost in {days} days, in dollars?",
        f"Every day {who} has a {name} of {watts:,} W on for {hours} hours. How many kilowatt-hours must be paid for in {days} days, and how many dollars is that at {cents} cents each?",
    )
    rationale = d.pick(
        f"In {days} days it runs {days} * {hours} = {days * hours} hours. At {watts:,} W, which is {num(Fraction(watts, 1000))} kW, that uses {days * hours} * {num(Fraction(watts, 1000))} = {num(kwh)} kWh. The price is {num(kwh)} * {cents} = {num(kwh * cents)} cents, or {money(cost)}.",
        f"One day needs {num(Fraction(watts, 1000))} * {hours} = {num(kwh / days)} kWh, {days} days need {days} * {num(kwh / days)} = {num(kwh)} kWh. Multiplying by {num(Fraction(cents, 100))} dollars gives {num(kwh)} * {num(Fraction(cents, 100))} = {num(cost)}, that is {money(cost)}.",
    )
    return Problem(problem, rationale, cost, {"watts": watts, "hours": hours, "days": days, "cents": cents})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    missing_score,
    five_numbers,
    combined_mean,
    mean_changes,
    simple_interest,
    compound_interest,
    instalments,
    profit_percent,
    salary_tax,
    electricity_meter,
)
