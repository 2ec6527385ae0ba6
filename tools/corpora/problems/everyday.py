"""Templates about buying, sharing, packing and saving."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from .draw import Draw, Problem, a, money, num, plural


def shopping_change(d: Draw) -> Problem:
    who, shop = d.name(), d.pick("the corner shop", "a stationer's", "the market", "the school fair")
    (one, pa), (two, pb) = d.sample(
        [("notebooks", 225), ("pencils", 45), ("erasers", 70), ("rulers", 135), ("folders", 160), ("markers", 190)], 2
    )
    na, nb = d.whole(2, 7), d.whole(2, 9)
    pa, pb = pa + 5 * d.whole(0, 9), pb + 5 * d.whole(0, 9)
    ca, cb = Fraction(pa, 100), Fraction(pb, 100)
    total = na * ca + nb * cb
    paid = next(n for n in (10, 20, 50, 100) if n > total)
    change = paid - total
    problem = d.pick(
        f"At {shop} {who} buys {na} {one} at {money(ca)} each and {nb} {two} at {money(cb)} each, and pays with a ${paid} note. How much change is due?",
        f"{who} has ${paid} and goes to {shop}. There, {na} {one} cost {money(ca)} apiece and {nb} {two} cost {money(cb)} apiece. If {who} buys all of these, how much money is left?",
        f"On a bill from {shop} one finds {na} {one} at {money(ca)} and {nb} {two} at {money(cb)}. {who} hands over ${paid}. What should come back?",
    )
    rationale = d.pick(
        f"For the {one} one pays {na} * {money(ca)} = {money(na * ca)}, for the {two} {nb} * {money(cb)} = {money(nb * cb)}. Together that is {money(na * ca)} + {money(nb * cb)} = {money(total)}. From ${paid} there remain ${paid} - {money(total)} = {money(change)}.",
        f"First add up the bill: {na} * {money(ca)} + {nb} * {money(cb)} = {money(na * ca)} + {money(nb * cb)} = {money(total)}. Subtracting it from the money handed over gives ${paid} - {money(total)} = {money(change)}, which is the change.",
    )
    return Problem(problem, rationale, change, {"na": na, "nb": nb, "ca": ca, "cb": cb, "paid": paid})


def sharing_with_remainder(d: Draw) -> Problem:
    thing = d.pick("marbles", "stickers", "walnuts", "beads", "seashells", "trading cards", "apricots")
    people, each = d.whole(5, 13), d.whole(7, 29)
    rest = d.whole(2, people - 2)
    total = people * each + rest
    more = people - rest
    who = d.name()
    problem = d.pick(
        f"{who} wants to share {total} {thing} equally among {people} children. How many {thing} does each child get, how many are left over, and how many more would be needed to give everybody one more?",
        f"A jar holds {total} {thing}. {people} friends divide them so that each has the same number, as many as possible. Find each friend's share and the remainder, and say how many extra {thing} would let every share grow by one.",
    )
    rationale = d.pick(
        f"Dividing {total} by {people}: {people} * {each} = {people * each}, and {people} * {each + 1} = {people * (each + 1)} is already too many. Each share is therefore {each}, with {total} - {people * each} = {rest} left over. To raise every share by one we need {people * (each + 1)} - {total} = {more} more.",
        f"The largest multiple of {people} that does not exceed {total} is {people} * {each} = {people * each}. So everyone receives {each} and {total} - {people * each} = {rest} remain. One more for each of the {people} would take {people} in all, but {rest} are already there, so {people} - {rest} = {more} are missing.",
    )
    return Problem(
        problem,
        rationale,
        f"{each} each, {rest} left, {more} more",
        {"total": total, "people": people, "each": each, "rest": rest, "more": more},
    )


def crates_needed(d: Draw) -> Problem:
    thing, box = d.pick(
        ("eggs", "carton"), ("bottles", "crate"), ("tiles", "box"), ("bulbs", "tray"), ("jars of honey", "case")
    )
    per = d.pick(6, 8, 12, 15, 18, 24)
    total = d.until(lambda: d.whole(110, 900), lambda n: n % per > 1)
    boxes = -(-total // per)
    last = total - (boxes - 1) * per
    problem = (
        d.pick(
            f"Before the weekend a farm shop has to pack {total} {thing}, {per} to a {box}. How many {box}s does it need, and how many {thing} go into the last one?",
            f"{total} {thing} are to be delivered. Each {box} takes {per} of them. What is the smallest number of {box}s that will do, and how full is the last {box}?",
        )
        if box != "box"
        else f"A builder needs {total} {thing} for a kitchen. They come in boxes of {per}. How many boxes must be opened, and how many {thing} are taken from the last one?"
    )
    many = "boxes" if box == "box" else box + "s"
    rationale = d.pick(
        f"{boxes - 1} full {many} hold {boxes - 1} * {per} = {(boxes - 1) * per} {thing}, which leaves {total} - {(boxes - 1) * per} = {last} without a place. One more {box} is needed for them, so {boxes} {many} in all, the last one holding {last}.",
        f"Since {boxes - 1} * {per} = {(boxes - 1) * per} is less than {total} but {boxes} * {per} = {boxes * per} is more, {boxes} {many} are needed. The last contains {total} - {(boxes - 1) * per} = {last} {thing}; rounding down would have left those behind.",
    )
    return Problem(problem, rationale, boxes, {"total": total, "per": per, "last": last})


def saving_weeks(d: Draw) -> Problem:
    who, goal_thing = (
        d.name(),
        d.pick("a bicycle", "a guitar", "a tent", "a telescope", "a sewing machine", "a pair of skis"),
    )
    have, weekly, spend = d.whole(15, 60), d.whole(14, 30), d.whole(3, 9)
    net = weekly - spend
    goal = have + net * d.whole(7, 25) - d.whole(0, net - 1)
    weeks = -(-(goal - have) // net)
    final = have + weeks * net
    problem = d.pick(
        f"{who} is saving for {goal_thing} that costs ${goal}. There are already ${have} in the tin. Every week {who} earns ${weekly} and spends ${spend} of it. After how many weeks can the purchase be made?",
        f"With ${have} put aside, {who} sets out to buy {goal_thing} priced at ${goal}. Weekly income is ${weekly}, weekly expenses are ${spend}, and the difference is saved. How many full weeks must pass?",
    )
    rationale = d.pick(
        f"Each week adds ${weekly} - ${spend} = ${net}. Still missing are ${goal} - ${have} = ${goal - have}. After {weeks - 1} weeks the savings are ${have} + {weeks - 1} * ${net} = ${have + (weeks - 1) * net:,}, not enough; after {weeks} weeks they are ${have} + {weeks} * ${net} = ${final:,}, which covers ${goal}. It takes {weeks} weeks.",
        f"We need the smallest whole n with {have} + {net}n at least {goal}, because the weekly saving is {weekly} - {spend} = {net} dollars. That means {net}n must reach {goal} - {have} = {goal - have}. As {net} * {weeks - 1} = {net * (weeks - 1)} falls short and {net} * {weeks} = {net * weeks} does not, n = {weeks}.",
    )
    return Problem(problem, rationale, weeks, {"goal": goal, "have": have, "weekly": weekly, "spend": spend})


def heads_and_legs(d: Draw) -> Problem:
    one, la, two, lb, what = d.pick(
        ("chickens", 2, "goats", 4, "legs"),
        ("tricycles", 3, "bicycles", 2, "wheels"),
        ("spiders", 8, "beetles", 6, "legs"),
        ("three-legged stools", 3, "four-legged chairs", 4, "legs"),
        ("motorcycles", 2, "cars", 4, "wheels"),
    )
    x, y = d.whole(5, 24), d.whole(5, 24)
    total, legs = x + y, la * x + lb * y
    if la > lb:
        one, la, two, lb, x, y = two, lb, one, la, y, x
    problem = d.pick(
        f"Some {one} and {two} are counted together: there are {total} of them, with {legs} {what} altogether. How many {one} and how many {two} are there?",
        f"Among {one} and {two}, {total} in number, one counts {legs} {what}. Work out how many there are of each kind.",
    )
    low, gap = la * total, legs - la * total
    rationale = d.pick(
        f"If all {total} were {one}, there would be {la} * {total} = {low} {what}. The count shows {legs} - {low} = {gap} more. Every one of the {two} brings {lb} - {la} = {lb - la} extra, so there are {gap} / {lb - la} = {y} {two} and {total} - {y} = {x} {one}.",
        f"Let y be the number of {two}; then {total} - y are {one}. Counting {what}: {la}({total} - y) + {lb}y = {legs}, which simplifies to {low} + {lb - la}y = {legs}. Hence y = ({legs} - {low}) / {lb - la} = {y}, and the number of {one} is {total} - {y} = {x}. Check: {la} * {x} + {lb} * {y} = {legs}.",
    ).replace(" 1y", " y")
    return Problem(
        problem, rationale, f"{x} {one}, {y} {two}", {"total": total, "legs": legs, "la": la, "lb": lb, "x": x, "y": y}
    )


def best_offer(d: Draw) -> Problem:
    thing, unit = d.pick(
        ("olive oil", "litre"),
        ("rice", "kilogram"),
        ("washing powder", "kilogram"),
        ("paint", "litre"),
        ("coffee", "kilogram"),
    )
    q1, q2 = d.sample([2, 4, 5, 8, 10], 2)
    u1 = Fraction(d.whole(220, 640, 5), 100)
    u2 = u1 + Fraction(d.pick(-35, -20, -15, 10, 25, 30), 100)
    p1, p2 = q1 * u1, q2 * u2
    best = ("first", q1, u1) if u1 < u2 else ("second", q2, u2)
    diff = abs(u1 - u2)
    problem = d.pick(
        f"You can get {thing} in two sizes, {q1} {unit}s for {money(p1)} or {q2} {unit}s for {money(p2)}. Which is the better buy, and by how much per {unit}?",
        f"Which is cheaper per {unit}: {a(q1)}-{unit} pack of {thing} at {money(p1)}, or {a(q2)}-{unit} pack at {money(p2)}? Give the difference.",
    )
    rationale = d.pick(
        f"Compare the price of one {unit}. The first pack costs {money(p1)} / {q1} = {money(u1)} per {unit}, the second {money(p2)} / {q2} = {money(u2)}. The {best[0]} is cheaper, by {money(max(u1, u2))} - {money(min(u1, u2))} = {money(diff)} per {unit}.",
        f"{money(p1)} / {q1} = {money(u1)} and {money(p2)} / {q2} = {money(u2)} are the unit prices. The smaller of the two, {money(best[2])}, belongs to the {best[1]}-{unit} pack, so that one is the better buy, saving {money(diff)} on every {unit}.",
    )
    return Problem(problem, rationale, diff, {"q1": q1, "q2": q2, "p1": p1, "p2": p2})


def books_read(d: Draw) -> Problem:
    who = d.name()
    pages, first, more = d.whole(240, 520, 10), d.whole(12, 25), d.whole(3, 9)
    read, day = 0, 0
    steps = []
    while read < pages:
        today = first + day * more
        read += today
        day += 1
        steps.append(read)
    problem = d.pick(
        f"{who} starts a book of {pages} pages by reading {first} pages on the first day and then reads {more} pages more every day than the day before. On which day is the book finished?",
        f"A novel has {pages} pages. On day one {who} reads {first} pages, and each day after that {more} more than on the previous day. How many days does the novel last?",
    )
    tail = steps[-3:]
    rationale = d.pick(
        f"Day by day the numbers {first}, {first + more}, {first + 2 * more}, ... form an arithmetic sequence. Running totals are {', '.join(num(s) for s in steps[:3])}, and so on; after {day - 1} days {steps[-2]} pages are read, which is under {pages}, and after {day} days the total would be {steps[-1]}, which is enough. The book is finished on day {day}.",
        f"After n days the total is n * {first} + {more} * n(n - 1)/2. For n = {day - 1} this is {(day - 1)} * {first} + {more} * {(day - 1) * (day - 2) // 2} = {tail[-2]}, still below {pages}; for n = {day} it is {day} * {first} + {more} * {day * (day - 1) // 2} = {tail[-1]}, at least {pages}. So the answer is {plural(day, 'day')}.",
    )
    return Problem(problem, rationale, day, {"pages": pages, "first": first, "more": more})


def recipe_scaling(d: Draw) -> Problem:
    who, dish = d.name(), d.pick("pancakes", "lentil soup", "apple crumble", "dumplings", "rice pudding")
    serves, guests = d.pick((4, 10), (6, 15), (8, 12), (4, 14), (6, 21), (5, 12), (8, 20))
    flour = serves * d.whole(30, 90, 5)
    milk = serves * d.whole(40, 110, 10)
    factor = Fraction(guests, serves)
    problem = d.pick(
        f"Grandmother's recipe for {dish} that serves {serves} uses {flour} g of the dry mix and {milk} ml of milk. {who} expects {guests} guests. How much of each is needed?",
        f"For {serves} portions of {dish} one takes {flour} g of dry ingredients and {milk} ml of milk. {who} wants to cook {guests} portions. Find the two amounts.",
    )
    rationale = d.pick(
        f"One portion needs {flour} / {serves} = {flour // serves} g and {milk} / {serves} = {milk // serves} ml. For {guests} portions that makes {guests} * {flour // serves} = {num(flour * factor)} g of dry mix and {guests} * {milk // serves} = {num(milk * factor)} ml of milk.",
        f"Everything is scaled by the factor {guests}/{serves} = {num(factor)}. Dry ingredients: {flour} * {num(factor)} = {num(flour * factor)} g. Milk: {milk} * {num(factor)} = {num(milk * factor)} ml.",
    )
    return Problem(
        problem,
        rationale,
        f"{num(flour * factor)} g, {num(milk * factor)} ml",
        {"serves": serves, "guests": guests, "flour": flour, "milk": milk},
    )


def undo_the_steps(d: Draw) -> Problem:
    who = d.name()
    start, gift = d.whole(6, 25) * 6, d.whole(5, 30)
    after_half = start // 2
    after_gift = after_half + gift
    lost = d.until(lambda: d.whole(3, 40), lambda n: n < after_gift - 5)
    end = after_gift - lost
    thing = d.pick("coins", "stamps", "points", "buttons", "postcards")
    problem = d.pick(
        f"{who} gave half of a collection of {thing} to a cousin, then received {gift} {thing} from a neighbour, then lost {lost}. Now there are {end}. How many {thing} were there at the start?",
        f"I think of how many {thing} {who} had. Halve the number, add {gift}, take away {lost}, and {end} remain. What was the number?",
    )
    rationale = d.pick(
        f"Work backwards. Before the loss there were {end} + {lost} = {after_gift}. Before the gift of {gift} there were {after_gift} - {gift} = {after_half}. That was half of the beginning, so the beginning was 2 * {after_half} = {start}.",
        f"Let s be the starting number. Then s/2 + {gift} - {lost} = {end}, so s/2 = {end} + {lost} - {gift} = {after_half} and s = 2 * {after_half} = {start}. Going forwards confirms it: {start} / 2 + {gift} - {lost} = {end}.",
    )
    return Problem(problem, rationale, start, {"gift": gift, "lost": lost, "end": end})


def taxi_fare(d: Draw) -> Problem:
    one, two = d.names(2)
    base1, rate1 = Fraction(d.whole(250, 500, 25), 100), Fraction(d.whole(120, 180, 5), 100)
    gap = Fraction(d.whole(10, 40, 5), 100)
    even = d.whole(6, 18)
    rate2, base2 = rate1 + gap, base1 - gap * even
    base1 += 5
    base2 += 5
    problem = d.pick(
        f"{one}'s taxi company charges {money(base1)} plus {money(rate1)} per kilometre; {two}'s charges {money(base2)} plus {money(rate2)} per kilometre. For what distance do both ask the same fare, and what is that fare?",
        f"Two carriers compete. The first takes a fixed {money(base1)} and {money(rate1)} for each kilometre, the second a fixed {money(base2)} and {money(rate2)} for each kilometre. At how many kilometres does it not matter whether one calls {one} from the first or {two} from the second, and what does the ride cost then?",
    )
    fare = base1 + rate1 * even
    rationale = d.pick(
        f"The fixed charges differ by {money(base1)} - {money(base2)} = {money(base1 - base2)}, and every kilometre the second gains {money(rate2)} - {money(rate1)} = {money(gap)}. They meet after {num(base1 - base2)} / {num(gap)} = {even} km. The fare is then {money(base1)} + {even} * {money(rate1)} = {money(fare)}.",
        f"With k kilometres the fares are {num(base1)} + {num(rate1)}k and {num(base2)} + {num(rate2)}k. Setting them equal gives {num(base1 - base2)} = {num(gap)}k, hence k = {even}. Either way the ride costs {money(base2)} + {even} * {money(rate2)} = {money(fare)}.",
    )
    return Problem(problem, rationale, even, {"base1": base1, "base2": base2, "rate1": rate1, "rate2": rate2})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    shopping_change,
    sharing_with_remainder,
    crates_needed,
    saving_weeks,
    heads_and_legs,
    best_offer,
    books_read,
    recipe_scaling,
    undo_the_steps,
    taxi_fare,
)
