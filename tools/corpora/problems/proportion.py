"""Templates about ratios, percentages, mixtures, scale, currencies and units."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import gcd

from .draw import Draw, Problem, a, frac, listed, money, num


def ratio_of_three(d: Draw) -> Problem:
    x, y, z = d.names(3)
    p, q, r = d.sample([2, 3, 4, 5, 6, 7, 8, 9], 3)
    unit = d.whole(12, 65)
    total = (p + q + r) * unit
    what, pre, post = d.pick(
        ("prize money", "$", ""),
        ("seed potatoes", "", " kg"),
        ("harvest of plums", "", " kg"),
        ("inheritance", "$", ""),
        ("water from the tank", "", " litres"),
    )
    shares = {x: p * unit, y: q * unit, z: r * unit}
    most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
    diff = shares[most] - shares[least]
    problem = d.pick(
        f"{x}, {y} and {z} split {pre}{total}{post} ({what}) in the ratio {p}:{q}:{r}. How much more does {most} receive than {least}?",
        f"The {what}, {pre}{total}{post} in all, is divided among {x}, {y} and {z} as {p} to {q} to {r}. By how much does {most}'s part exceed {least}'s?",
    )
    rationale = d.pick(
        f"There are {p} + {q} + {r} = {p + q + r} equal parts, each worth {total} / {p + q + r} = {unit}. {most} takes {shares[most] // unit} parts, that is {shares[most] // unit} * {unit} = {shares[most]}, and {least} takes {shares[least] // unit} * {unit} = {shares[least]}. The difference is {shares[most]} - {shares[least]} = {pre}{diff}{post}.",
        f"{most} has {shares[most] // unit} - {shares[least] // unit} = {diff // unit} parts more than {least}. One part is {total} / ({p} + {q} + {r}) = {unit}, so the difference comes to {diff // unit} * {unit} = {pre}{diff}{post}.",
    )
    return Problem(problem, rationale, diff, {"p": p, "q": q, "r": r, "total": total})


def joined_ratios(d: Draw) -> Problem:
    a1, b1, b2, c1 = d.until(
        lambda: (d.whole(2, 7), d.whole(2, 7), d.whole(2, 7), d.whole(2, 7)),
        lambda v: gcd(v[0], v[1]) == 1 == gcd(v[2], v[3]) and v[1] != v[2],
    )
    lcm = b1 * b2 // gcd(b1, b2)
    x, y, z = a1 * lcm // b1, lcm, c1 * lcm // b2
    k = d.whole(3, 14)
    red, blue, green = d.pick(
        ("red", "blue", "green"), ("oak", "beech", "birch"), ("silver", "copper", "tin"), ("long", "medium", "short")
    )
    thing = {"red": "counters", "oak": "trees", "silver": "medals", "long": "planks"}[red]
    total = (x + y + z) * k
    problem = d.pick(
        f"In a lot of {total} {thing}, the {red} ones are to the {blue} ones as {a1} to {b1}, and the {blue} ones to the {green} ones as {b2} to {c1}. How many {green} {thing} are there?",
        f"Among some {thing} the ratio of {red} to {blue} is {a1}:{b1} and the ratio of {blue} to {green} is {b2}:{c1}. Altogether there are {total}. Find the number of {green} {thing}.",
    )
    rationale = d.pick(
        f"Make the {blue} share equal in both ratios. The least common multiple of {b1} and {b2} is {lcm}, so {red} : {blue} : {green} = {x}:{y}:{z}. That is {x} + {y} + {z} = {x + y + z} parts, and one part holds {total} / {x + y + z} = {k}. The {green} ones number {z} * {k} = {z * k}.",
        f"Writing both ratios with {lcm} for {blue} gives {x}:{lcm} and {lcm}:{z}. Then {green} makes up {z}/{x + y + z} of the whole, which is {total} * {z} / {x + y + z} = {z * k} {thing}.",
    )
    return Problem(problem, rationale, z * k, {"a1": a1, "b1": b1, "b2": b2, "c1": c1, "total": total})


def discount_then_tax(d: Draw) -> Problem:
    item = d.pick("a coat", "a desk lamp", "a rucksack", "a radio", "a set of pans", "a pair of boots", "a camera")
    price, off, tax = d.whole(40, 400, 20), d.pick(10, 15, 20, 25, 30, 40), d.pick(5, 10, 20)
    reduced = price * Fraction(100 - off, 100)
    final = reduced * Fraction(100 + tax, 100)
    problem = d.pick(
        f"Listed at ${price}, {item} goes on sale. It is reduced by {off}%, and then {tax}% sales tax is added to the reduced price. What does the customer pay?",
        f"In a sale {item} marked ${price} is sold at {off}% off. The till then adds tax of {tax}%. How much is paid in the end?",
    )
    rationale = d.pick(
        f"After the reduction {100 - off}% of the price remains: {price} * {num(Fraction(100 - off, 100))} = {num(reduced)}. Tax makes this {100 + tax}% of itself: {num(reduced)} * {num(Fraction(100 + tax, 100))} = {num(final)}. The customer pays {money(final)}.",
        f"First comes the discount, {price} * {off} / 100 = {num(price - reduced)} dollars, leaving {price} - {num(price - reduced)} = {num(reduced)}. The tax on that is {num(reduced)} * {tax} / 100 = {num(final - reduced)}. In the end {money(reduced)} + {money(final - reduced)} = {money(final)} is due.",
    )
    return Problem(problem, rationale, final, {"price": price, "off": off, "tax": tax})


def original_price(d: Draw) -> Problem:
    shop, item = (
        d.pick("A bookseller", "An outlet", "A garden centre", "A cycle shop"),
        d.pick("an atlas", "a lantern", "a wheelbarrow", "a helmet", "a watering can"),
    )
    rate, price = d.until(
        lambda: (d.pick(5, 10, 15, 20, 25, 30, 35, 40), d.whole(20, 240, 4)), lambda v: (v[0] * v[1]) % 100 == 0
    )
    up = d.pick(True, False)
    now = price * (100 + rate if up else 100 - rate) // 100
    verb = "raising" if up else "lowering"
    factor = Fraction(100 + rate if up else 100 - rate, 100)
    trap = "taking" if up else "adding"
    problem = d.pick(
        f"After {verb} the price by {rate}%, {shop[0].lower() + shop[1:]} asks ${now} for {item}. What was the price before?",
        f"{shop} now sells {item} for ${now}, following {'an increase' if up else 'a reduction'} of {rate}%. Find the earlier price.",
    )
    rationale = d.pick(
        f"What is paid now is {100 + rate if up else 100 - rate}% of the old price, so that was {now} / {num(factor)} = {price} dollars. ({trap.capitalize()} {rate}% {'off' if up else 'to'} ${now} would be wrong, because the {rate}% were counted from the old price.)",
        f"Let p be the earlier price in dollars. Then {num(factor)}p = {now}, and p = {now} / {num(factor)} = {price}. Indeed {rate}% of {price} is {price * rate // 100}, and {price} {'+' if up else '-'} {price * rate // 100} = {now}.",
    )
    return Problem(problem, rationale, price, {"rate": rate, "now": now, "up": int(up)})


def successive_changes(d: Draw) -> Problem:
    what = d.pick(
        "membership of a choir",
        "the number of visitors to a museum",
        "a town's population",
        "the output of a mill",
        "the level of subscriptions",
    )
    r1, r2 = d.pick(10, 20, 25, 30, 40, 50), d.pick(10, 20, 25, 30, 40)
    factor = Fraction(100 + r1, 100) * Fraction(100 - r2, 100)
    change = (factor - 1) * 100
    start = d.whole(4, 30) * 200
    end = start * factor
    problem = d.pick(
        f"In one year {what} rose by {r1}%; in the next it fell by {r2}%. If it stood at {start:,} at first, where did it stand after the two years, and what was the overall change in percent?",
        f"From {start:,}, {what} grows by {r1}% and afterwards shrinks by {r2}%. Give the final figure and the percentage change over both steps.",
    )
    word = (
        "no change at all" if change == 0 else f"{'an increase' if change > 0 else 'a decrease'} of {num(abs(change))}%"
    )
    rationale = d.pick(
        f"At first the number is multiplied by {num(Fraction(100 + r1, 100))}, giving {num(start * Fraction(100 + r1, 100))}; then by {num(Fraction(100 - r2, 100))}, giving {num(end)}. Together the factor is {num(Fraction(100 + r1, 100))} * {num(Fraction(100 - r2, 100))} = {num(factor)}, which means {word}. The two percentages do not simply add up, since they refer to different amounts.",
        f"{start:,} * {num(Fraction(100 + r1, 100))} = {num(start * Fraction(100 + r1, 100))}, and of this {100 - r2}% remains: {num(start * Fraction(100 + r1, 100))} * {num(Fraction(100 - r2, 100))} = {num(end)}. Compared with {start:,} that is {word}.",
    )
    return Problem(problem, rationale, end, {"r1": r1, "r2": r2, "start": start})


def mix_two_solutions(d: Draw) -> Problem:
    stuff = d.pick("salt", "acid", "sugar", "alcohol", "antifreeze")
    c1, c2 = d.sample([5, 10, 15, 20, 30, 40, 50, 60], 2)
    v1, v2 = d.until(
        lambda: (d.whole(2, 12), d.whole(2, 12)),
        lambda v: (v[0] * c1 + v[1] * c2) % (v[0] + v[1]) == 0 and v[0] != v[1],
    )
    conc = (v1 * c1 + v2 * c2) // (v1 + v2)
    p1, p2 = Fraction(v1 * c1, 100), Fraction(v2 * c2, 100)
    problem = d.pick(
        f"{v1} litres of a {c1}% {stuff} solution are poured together with {v2} litres of a {c2}% solution. What is the strength of the mixture?",
        f"In a laboratory a technician combines {v1} litres that are {c1}% {stuff} with {v2} litres that are {c2}% {stuff}. Find the percentage of {stuff} in the result.",
    )
    rationale = d.pick(
        f"Count the {stuff}. From the first part come {v1} * {num(Fraction(c1, 100))} = {num(p1)} litres, from the second {v2} * {num(Fraction(c2, 100))} = {num(p2)}. In {v1} + {v2} = {v1 + v2} litres there are then {num(p1 + p2)} litres of {stuff}, and {num(p1 + p2)} / {v1 + v2} = {num(Fraction(conc, 100))}, so the mixture is {conc}% strong.",
        f"What results is the average of {c1} and {c2} weighted by volume: ({v1} * {c1} + {v2} * {c2}) / ({v1} + {v2}) = {v1 * c1 + v2 * c2} / {v1 + v2} = {conc}. The mixture contains {conc}% {stuff}, between the two as it must be.",
    )
    return Problem(problem, rationale, conc, {"v1": v1, "v2": v2, "c1": c1, "c2": c2})


def dilute_with_water(d: Draw) -> Problem:
    who = d.name()
    c, t, v = d.until(
        lambda: (d.pick(20, 30, 40, 45, 50, 60, 75), d.pick(5, 8, 10, 12, 15, 20, 25), d.whole(2, 30)),
        lambda x: x[1] < x[0] and (x[2] * x[0]) % x[1] == 0,
    )
    total = v * c // t
    water = total - v
    liquid = d.pick("vinegar", "cleaning concentrate", "fruit syrup", "plant feed", "dye")
    problem = d.pick(
        f"{who} has {v} litres of {liquid} at {c}% and wants it at {t}%. How much water must be added?",
        f"How many litres of water turn {v} litres of {c}% {liquid} into {t}% {liquid}?",
    )
    rationale = d.pick(
        f"Adding water does not change the amount of active substance, which is {v} * {c} / 100 = {num(Fraction(v * c, 100))} litres. At {t}% this must be {t}/100 of the new volume, so the new volume is {num(Fraction(v * c, 100))} * 100 / {t} = {total} litres. The water added is {total} - {v} = {water} litres.",
        f"Call the water w. The substance stays the same: {v} * {c} = {t} * ({v} + w), or {v * c} = {t * v} + {t}w. Therefore w = ({v * c} - {t * v}) / {t} = {water} litres.",
    )
    return Problem(problem, rationale, water, {"c": c, "t": t, "v": v})


def alloy_price(d: Draw) -> Problem:
    x, y = d.pick(
        ("arabica", "robusta"), ("almonds", "peanuts"), ("green tea", "mint"), ("barley", "oats"), ("dates", "raisins")
    )
    hi, lo = d.whole(12, 24), d.whole(4, 10)
    total = d.whole(2, 8) * (hi - lo)
    target = d.whole(lo + 1, hi - 1)
    kx = total * (target - lo) // (hi - lo)
    ky = total - kx
    problem = d.pick(
        f"To fill an order a merchant mixes {x} at ${hi} a kilogram with {y} at ${lo} a kilogram to get {total} kg worth ${target} a kilogram. How many kilograms of each go in?",
        f"{total} kg of a blend should cost ${target} per kg. It is made of {x} (${hi} per kg) and {y} (${lo} per kg). Find the two quantities.",
    )
    rationale = d.pick(
        f"If everything were {y}, the {total} kg would be worth {total} * {lo} = {total * lo} dollars, but {total} * {target} = {total * target} are wanted, which is {total * target} - {total * lo} = {total * (target - lo)} more. Each kilogram exchanged for {x} adds {hi} - {lo} = {hi - lo}, so {total * (target - lo)} / {hi - lo} = {kx} kg of {x} and {total} - {kx} = {ky} kg of {y} are used.",
        f"Note that {target} lies {target - lo} above {lo} and {hi - target} below {hi}. The quantities are in the opposite ratio, {x} : {y} = {target - lo}:{hi - target}, and {target - lo} + {hi - target} = {hi - lo} parts make {total} kg. So {x}: {total} * {target - lo} / {hi - lo} = {kx} kg, and {y}: {total} * {hi - target} / {hi - lo} = {ky} kg.",
    )
    return Problem(
        problem, rationale, f"{kx} kg, {ky} kg", {"hi": hi, "lo": lo, "target": target, "total": total, "kx": kx}
    )


def map_scale(d: Draw) -> Problem:
    x, y = d.towns(2)
    scale, tenths = d.pick(25_000, 50_000, 100_000, 200_000, 250_000), d.whole(24, 128, 4)
    cm = Fraction(tenths, 10)
    km = cm * scale / 100_000
    speed = d.pick(4, 5, 16, 20)
    minutes = km / speed * 60
    how = "walks" if speed < 10 else "cycles"
    who = d.name()
    problem = d.pick(
        f"On a map drawn to 1:{scale:,}, {x} and {y} are {num(cm)} cm apart. {who} {how} there in a straight line at {speed} km/h. How many minutes does that take?",
        f"Between {x} and {y} one measures {num(cm)} cm on a 1:{scale:,} map. How long, in minutes, does {who} need who {how} it at {speed} km/h?",
    )
    rationale = d.pick(
        f"One centimetre on the map stands for {scale:,} cm, which is {num(Fraction(scale, 100_000))} km. The real distance is {num(cm)} * {num(Fraction(scale, 100_000))} = {num(km)} km. At {speed} km/h this takes {num(km)} / {speed} hours, or {num(km)} * 60 / {speed} = {num(minutes)} minutes.",
        f"In reality the way is {num(cm)} * {scale:,} = {num(cm * scale)} cm long, that is {num(km)} km. A speed of {speed} km/h means one kilometre in 60 / {speed} = {num(Fraction(60, speed))} minutes, so {num(km)} km need {num(km)} * {num(Fraction(60, speed))} = {num(minutes)} minutes.",
    )
    return Problem(problem, rationale, minutes, {"scale": scale, "cm": cm, "speed": speed})


def fraction_of_remainder(d: Draw) -> Problem:
    who, thing = d.name(), d.pick("a sack of flour", "a roll of ribbon", "a barrel of cider", "a bag of seed")
    unit = {"a sack of flour": "kg", "a roll of ribbon": "m", "a barrel of cider": "litres", "a bag of seed": "kg"}[
        thing
    ]
    f1 = d.pick(Fraction(1, 3), Fraction(1, 4), Fraction(2, 5), Fraction(1, 2), Fraction(3, 8))
    f2 = d.pick(Fraction(1, 2), Fraction(2, 3), Fraction(3, 5), Fraction(1, 4), Fraction(3, 4))
    left_share = (1 - f1) * (1 - f2)
    start = left_share.denominator * f1.denominator * d.whole(1, 6)
    left = start * left_share
    rest = start * (1 - f1)
    problem = d.pick(
        f"{who} uses {frac(f1)} of {thing} in the morning and {frac(f2)} of the rest in the afternoon. Then {num(left)} {unit} are left. How much was there at first?",
        f"From {thing}, {frac(f1)} is taken out; from what remains, {frac(f2)} is taken. If {num(left)} {unit} stay behind, what did the full amount come to?",
    )
    rationale = d.pick(
        f"After the first step {frac(1 - f1)} remains, after the second {frac(1 - f2)} of that: {frac(1 - f1)} * {frac(1 - f2)} = {frac(left_share)}. So {frac(left_share)} of the start is {num(left)} {unit}, and the start was {num(left)} / ({frac(left_share)}) = {num(start)} {unit}.",
        f"Go back step by step. The {num(left)} {unit} are {frac(1 - f2)} of what was there at noon, so at noon there were {num(left)} / ({frac(1 - f2)}) = {num(rest)}. That in turn is {frac(1 - f1)} of the beginning, which was therefore {num(rest)} / ({frac(1 - f1)}) = {num(start)} {unit}.",
    )
    return Problem(problem, rationale, start, {"f1": f1, "f2": f2, "left": left})


def currency_chain(d: Draw) -> Problem:
    who = d.name()
    x, y, z = d.sample(["crowns", "florins", "talers", "ducats", "guilders", "marks"], 3)
    p, q, r, s = d.until(
        lambda: (d.whole(2, 9), d.whole(2, 9), d.whole(2, 9), d.whole(2, 9)), lambda v: v[0] != v[1] and v[2] != v[3]
    )
    n = p * r * d.whole(2, 9)
    mid, end = n * q // p, n * q // p * s // r
    problem = d.pick(
        f"At an old exchange, {p} {x} buy {q} {y}, and {r} {y} buy {s} {z}. {who} brings {n} {x}. How many {z} is that?",
        f"If {p} {x} are worth {q} {y} and {r} {y} are worth {s} {z}, how many {z} does {who} get for {n} {x}?",
    )
    rationale = d.pick(
        f"First to {y}: {n} * {q} / {p} = {mid}. Then to {z}: {mid} * {s} / {r} = {end}. So {who} receives {end} {z}.",
        f"Chain the two rates into one: {n} * {q} * {s} / ({p} * {r}) = {n * q * s} / {p * r} = {end}. The answer is {end} {z}; on the way there would have been {mid} {y}.",
    )
    return Problem(problem, rationale, end, {"p": p, "q": q, "r": r, "s": s, "n": n})


def percent_of_group(d: Draw) -> Problem:
    place = d.pick("an orchestra", "a school year", "a rowing club", "a workshop", "a village")
    people = d.whole(2, 20) * 40
    women = d.pick(40, 45, 55, 60, 65)
    pw, pm = d.pick(20, 25, 40, 60), d.pick(10, 30, 50, 75)
    w = people * women // 100
    m = people - w
    yes = Fraction(w * pw + m * pm, 100)
    if (w * pw) % 100 or (m * pm) % 100:
        return percent_of_group(d)
    trait = d.pick("wear glasses", "play chess", "speak a second language", "come by train")
    share = Fraction(yes, people) * 100
    problem = d.pick(
        f"Of the {people:,} people in {place}, {women}% are women. Of the women {pw}% {trait}, and of the men {pm}%. How many people {trait} altogether, and what percentage of everyone is that?",
        f"In {place} with {people:,} people, women make up {women}%. {pw}% of the women and {pm}% of the men {trait}. Find the number who do, and their share of the whole in percent.",
    )
    rationale = d.pick(
        f"Women: {people:,} * {num(Fraction(women, 100))} = {w:,}; men: {people:,} - {w:,} = {m:,}. Of these, {w:,} * {num(Fraction(pw, 100))} = {num(Fraction(w * pw, 100))} and {m:,} * {num(Fraction(pm, 100))} = {num(Fraction(m * pm, 100))} {trait}. The total is {num(yes)}, and {num(yes)} / {people:,} = {num(share / 100)}, that is {num(share)}%.",
        f"As shares of everybody: {num(Fraction(women, 100))} * {num(Fraction(pw, 100))} + {num(Fraction(100 - women, 100))} * {num(Fraction(pm, 100))} = {num(share / 100)}. So {num(share)}% {trait}, which in numbers is {people:,} * {num(share / 100)} = {num(yes)} people. (Averaging {pw}% and {pm}% would be wrong unless there were as many women as men.)",
    )
    return Problem(problem, rationale, yes, {"people": people, "women": women, "pw": pw, "pm": pm})


def shared_costs(d: Draw) -> Problem:
    people = d.names(3)
    months = d.sample([2, 3, 4, 5, 6, 8, 9, 10, 12], 3)
    rate = d.whole(14, 60)
    total = rate * sum(months)
    parts = [rate * m for m in months]
    problem = d.pick(
        f"{listed(people)} rent a boathouse together and pay ${total:,} in all. {people[0]} uses it for {months[0]} months, {people[1]} for {months[1]} and {people[2]} for {months[2]}. If the costs follow the time used, what does each pay?",
        f"Three owners share a pasture that costs ${total:,}. {people[0]}'s horse grazes there {months[0]} months, {people[1]}'s {months[1]} months and {people[2]}'s {months[2]} months. Divide the cost fairly among {listed(people)}.",
    )
    rationale = d.pick(
        f"Together that makes {months[0]} + {months[1]} + {months[2]} = {sum(months)} months, so one month costs {total:,} / {sum(months)} = {rate} dollars. {people[0]} pays {months[0]} * {rate} = {parts[0]}, {people[1]} pays {months[1]} * {rate} = {parts[1]} and {people[2]} pays {months[2]} * {rate} = {parts[2]} dollars.",
        f"Shares are proportional to {months[0]}, {months[1]} and {months[2]}, whose sum is {sum(months)}. Hence {total:,} * {months[0]} / {sum(months)} = {parts[0]}, {total:,} * {months[1]} / {sum(months)} = {parts[1]} and {total:,} * {months[2]} / {sum(months)} = {parts[2]}, in the order of the names; {parts[0]} + {parts[1]} + {parts[2]} = {total:,} confirms it.",
    )
    return Problem(problem, rationale, f"${parts[0]}, ${parts[1]}, ${parts[2]}", {"total": total, "months": months})


def rectangle_percent(d: Draw) -> Problem:
    up, down = d.pick(10, 20, 25, 30, 40, 50), d.pick(10, 20, 25, 30, 40)
    width = d.whole(10, 30, 10) * 2
    length = width + d.whole(1, 4) * 20
    factor = Fraction(100 + up, 100) * Fraction(100 - down, 100)
    area = length * width
    new = area * factor
    what = d.pick("garden bed", "banner", "paddock", "screen", "carpet")
    change = abs(factor - 1) * 100
    word = "stays as it was" if factor == 1 else f"{'grows' if factor > 1 else 'shrinks'} by {num(change)}%"
    problem = d.pick(
        f"{a(length).capitalize()} by {width} rectangular {what} is made {up}% longer and {down}% narrower. How does its area change?",
        f"When a {what} measures {length} by {width}, its length is increased by {up}% and its width cut by {down}%. Compare the areas before and after.",
    )
    rationale = d.pick(
        f"Before, the area is {length} * {width} = {area:,}. The new sides are {num(length * Fraction(100 + up, 100))} and {num(width * Fraction(100 - down, 100))}, with area {num(length * Fraction(100 + up, 100))} * {num(width * Fraction(100 - down, 100))} = {num(new)}. The ratio {num(new)} / {area:,} = {num(factor)} shows that the area {word}.",
        f"Whatever the sides are, the area is multiplied by {num(Fraction(100 + up, 100))} * {num(Fraction(100 - down, 100))} = {num(factor)}, so it {word}. In numbers: from {area:,} to {area:,} * {num(factor)} = {num(new)} square units.",
    )
    return Problem(problem, rationale, new, {"up": up, "down": down, "length": length, "width": width})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    ratio_of_three,
    joined_ratios,
    discount_then_tax,
    original_price,
    successive_changes,
    mix_two_solutions,
    dilute_with_water,
    alloy_price,
    map_scale,
    fraction_of_remainder,
    currency_chain,
    percent_of_group,
    shared_costs,
    rectangle_percent,
)
