"""Templates about speed, work, flow and machines."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import gcd, lcm

from .draw import Draw, Problem, frac, money, num, plural


def two_trains_meet(d: Draw) -> Problem:
    x, y = d.towns(2)
    v1, v2 = d.whole(50, 110, 5), d.whole(50, 110, 5)
    hours = d.pick(Fraction(3, 2), Fraction(2), Fraction(5, 2), Fraction(3), Fraction(7, 2), Fraction(4))
    dist = (v1 + v2) * hours
    start = d.whole(6, 11)
    meet = Fraction(start) + hours
    clock = f"{int(meet)}:{int(meet % 1 * 60):02d}"
    how = d.pick("trains", "lorries", "buses")
    problem = d.pick(
        f"{x} and {y} are {num(dist)} km apart. At {start}:00 two {how} set out towards each other, one from each town, at {v1} km/h and {v2} km/h. When do they meet, and how far from {x} if the first one started there?",
        f"At {start}:00 one of two {how} leaves {x} for {y} at {v1} km/h and the other leaves {y} for {x} at {v2} km/h. The route is {num(dist)} km long. Find the time of meeting and its distance from {x}.",
    )
    rationale = d.pick(
        f"Every hour the gap closes by {v1} + {v2} = {v1 + v2} km, so they meet after {num(dist)} / {v1 + v2} = {num(hours)} hours, at {clock}. By then the one from {x} has covered {v1} * {num(hours)} = {num(v1 * hours)} km.",
        f"Let t be the hours after {start}:00. Together they cover {v1}t + {v2}t = {num(dist)}, thus t = {num(dist)} / {v1 + v2} = {num(hours)}, which is {clock} on the clock. The place lies {v1} * {num(hours)} = {num(v1 * hours)} km from {x}, and {v2} * {num(hours)} = {num(v2 * hours)} km from {y}.",
    )
    return Problem(problem, rationale, v1 * hours, {"v1": v1, "v2": v2, "dist": dist, "hours": hours})


def catching_up(d: Draw) -> Problem:
    one, two = d.names(2)
    slow, gap, head = d.until(
        lambda: (d.whole(4, 18), d.whole(2, 10), d.whole(1, 4)), lambda v: (v[0] * v[2]) % v[1] == 0
    )
    fast = slow + gap
    t = slow * head // gap
    problem = d.pick(
        f"{one} leaves camp at {slow} km/h. {plural(head, 'hour')} later {two} follows along the same path at {fast} km/h. How long does {two} travel before drawing level, and how far from camp are they then?",
        f"{two} sets off {plural(head, 'hour')} after {one} and goes {fast} km/h, while {one} keeps to {slow} km/h. After how many hours of travel does {two} catch {one}, and at what distance?",
    )
    rationale = d.pick(
        f"When {two} starts, {one} is {slow} * {head} = {slow * head} km ahead. The lead shrinks by {fast} - {slow} = {gap} km every hour and is gone after {slow * head} / {gap} = {t} hours. Both are then {fast} * {t} = {fast * t} km from camp.",
        f"If {two} has been moving for t hours, {one} has been moving for t + {head}. Equal distances: {fast}t = {slow}(t + {head}), so {gap}t = {slow * head} and t = {t}. The distance is {fast} * {t} = {fast * t} km, and for {one} it is {slow} * {t + head} = {slow * (t + head)} km, the same.",
    ).replace(" 1 hours", " 1 hour")
    return Problem(problem, rationale, t, {"slow": slow, "fast": fast, "head": head})


def average_speed(d: Draw) -> Problem:
    x, y = d.towns(2)
    v1, v2 = d.pick((30, 60), (40, 60), (60, 90), (20, 30), (45, 90), (10, 15), (12, 24), (60, 84), (42, 56), (24, 40))
    if d.pick(True, False):
        v1, v2 = v2, v1
    avg = Fraction(2 * v1 * v2, v1 + v2)
    dist = lcm(v1, v2) * d.whole(1, 2)
    t1, t2 = dist // v1, dist // v2
    problem = d.pick(
        f"Every morning a courier rides the {dist} km from {x} to {y} at {v1} km/h and comes back at {v2} km/h. What is the average speed for the whole journey?",
        f"Going out, a driver covers {dist} km at {v1} km/h; the way back is done at {v2} km/h. Find the average speed over both directions.",
    )
    rationale = d.pick(
        f"Going out lasts {dist} / {v1} = {t1} h and coming back {dist} / {v2} = {t2} h, together {t1} + {t2} = {t1 + t2} h for {2 * dist} km. The average is {2 * dist} / {t1 + t2} = {num(avg)} km/h. It is not the mean of {v1} and {v2}, because more time is spent at the lower speed.",
        f"For equal distances the average speed is 2 * {v1} * {v2} / ({v1} + {v2}) = {2 * v1 * v2} / {v1 + v2} = {num(avg)} km/h. The distance itself cancels; with {dist} km the trip takes {t1 + t2} hours in all, and {2 * dist} / {t1 + t2} = {num(avg)} agrees.",
    )
    return Problem(problem, rationale, avg, {"v1": v1, "v2": v2, "dist": dist})


def river_boat(d: Draw) -> Problem:
    boat, stream = d.until(lambda: (d.whole(8, 24), d.whole(2, 7)), lambda v: v[0] > v[1] + 3)
    down, up = boat + stream, boat - stream
    dist = down * up // gcd(down, up)
    dist = dist // 2 if dist > 150 and dist % 2 == 0 else dist * d.pick(1, 2) if dist < 60 else dist
    td, tu = Fraction(dist, down), Fraction(dist, up)
    problem = d.pick(
        f"On a river a boat needs {num(td)} hours for {num(dist)} km downstream and {num(tu)} hours for the same way upstream. How fast is the boat in still water, and how fast is the current?",
        f"Rowing with the current, a crew covers {num(dist)} km in {num(td)} hours; against it, the same stretch takes {num(tu)} hours. Find the crew's own speed and that of the river.",
    )
    rationale = d.pick(
        f"Downstream the speed is {num(dist)} / {num(td)} = {down} km/h, upstream {num(dist)} / {num(tu)} = {up} km/h. The first is boat plus current, the second boat minus current. Half their sum is the boat's speed, ({down} + {up}) / 2 = {boat} km/h; half their difference is the current, ({down} - {up}) / 2 = {stream} km/h.",
        f"With b for the boat and c for the current, b + c = {down} and b - c = {up}, from {num(dist)} / {num(td)} and {num(dist)} / {num(tu)}. Adding gives 2b = {2 * boat}, so b = {boat}; then c = {down} - {boat} = {stream}. The boat does {boat} km/h and the river {stream} km/h.",
    )
    return Problem(
        problem,
        rationale,
        f"{boat} km/h, {stream} km/h",
        {"dist": dist, "td": td, "tu": tu, "boat": boat, "stream": stream},
    )


def work_together(d: Draw) -> Problem:
    one, two = d.names(2)
    x, y = d.pick(
        (3, 6),
        (4, 12),
        (6, 12),
        (10, 15),
        (20, 30),
        (6, 30),
        (12, 24),
        (9, 18),
        (8, 24),
        (15, 30),
        (12, 36),
        (20, 5),
        (28, 21),
    )
    job = d.pick(
        "paint a fence",
        "weed the vegetable plot",
        "fold the newsletters",
        "tile a bathroom",
        "mow the meadow",
        "type the minutes",
    )
    unit = "hours" if max(x, y) < 16 else "days"
    both = Fraction(x * y, x + y)
    problem = d.pick(
        f"{one} alone would {job} in {x} {unit}, {two} alone in {y} {unit}. How long does it take them together?",
        f"To {job}, {one} needs {x} {unit} and {two} needs {y} {unit}. They work side by side. After how many {unit} are they done?",
    )
    rationale = d.pick(
        f"In one of the {unit} {one} does 1/{x} of the job and {two} does 1/{y}. Together that is 1/{x} + 1/{y} = {frac(1 / both)}, so the whole job takes 1 / ({frac(1 / both)}) = {num(both)} {unit}.",
        f"In {x * y} {unit} {one} could do the job {y} times and {two} {x} times, {x + y} times between them. Once therefore takes {x * y} / {x + y} = {num(both)} {unit}, less than either needs alone.",
    )
    return Problem(problem, rationale, both, {"x": x, "y": y})


def helper_leaves(d: Draw) -> Problem:
    one, two = d.names(2)
    x, y, t = d.until(
        lambda: (d.whole(6, 24), d.whole(6, 24), d.whole(2, 5)),
        lambda v: (
            v[0] != v[1]
            and Fraction(v[2], v[0]) + Fraction(v[2], v[1]) < 1
            and (v[1] * (1 - Fraction(v[2], v[0]) - Fraction(v[2], v[1]))).denominator == 1
        ),
    )
    done = Fraction(t, x) + Fraction(t, y)
    rest = y * (1 - done)
    task = d.pick(
        "digging a pond", "cataloguing a library", "picking an orchard", "plastering a hall", "restoring a boat"
    )
    problem = d.pick(
        f"For {task}, {one} would need {x} days and {two} {y} days. They begin together, but after {t} days {one} leaves. How many more days does {two} need to finish?",
        f"{one} can complete the job of {task} in {x} days and {two} in {y}. After {t} days of common work {two} goes on alone. How long until the end?",
    )
    rationale = d.pick(
        f"In {t} days they complete {t}/{x} + {t}/{y} = {frac(done)} of the work. What is left, 1 - {frac(done)} = {frac(1 - done)}, {two} does at 1/{y} a day, which takes {frac(1 - done)} * {y} = {num(rest)} days.",
        f"Let n be the extra days. {two} works {t} + n days and {one} only {t}: {t}/{x} + ({t} + n)/{y} = 1. Since 1 - {t}/{x} = {frac(1 - Fraction(t, x))}, {two} works {frac(1 - Fraction(t, x))} * {y} = {num((1 - Fraction(t, x)) * y)} days in all, of which {num((1 - Fraction(t, x)) * y)} - {t} = {num(rest)} come after {one} has gone.",
    ).replace(" 1 days", " 1 day")
    return Problem(problem, rationale, rest, {"x": x, "y": y, "t": t})


def tank_in_and_out(d: Draw) -> Problem:
    fill, drain = d.until(
        lambda: (d.whole(4, 20), d.whole(6, 40)), lambda v: v[1] > v[0] and (v[0] * v[1]) % (v[1] - v[0]) == 0
    )
    time = fill * drain // (drain - fill)
    cap = fill * drain * d.whole(2, 9)
    vessel = d.pick("cistern", "swimming pool", "reservoir", "brewing vat", "fish pond")
    problem = d.pick(
        f"An open tap fills a {vessel} in {fill} hours; the outlet would empty the full {vessel} in {drain} hours. If somebody forgets to shut the outlet, how long does filling take?",
        f"Some {vessel} of {cap:,} litres fills in {fill} hours through one pipe and empties in {drain} hours through another. Both are open and it is empty now. In how many hours will it be full?",
    )
    rationale = d.pick(
        f"Each hour 1/{fill} comes in and 1/{drain} goes out, a gain of 1/{fill} - 1/{drain} = {frac(Fraction(1, time))}. The {vessel} is full after 1 / ({frac(Fraction(1, time))}) = {time} hours.",
        f"Take a volume of {cap:,} litres. The inflow is {cap:,} / {fill} = {num(Fraction(cap, fill))} litres an hour, the outflow {cap:,} / {drain} = {num(Fraction(cap, drain))}. What stays is {num(Fraction(cap, fill))} - {num(Fraction(cap, drain))} = {num(Fraction(cap, fill) - Fraction(cap, drain))}, and {cap:,} / {num(Fraction(cap, fill) - Fraction(cap, drain))} = {time} hours.",
    )
    return Problem(problem, rationale, time, {"fill": fill, "drain": drain})


def machines_and_days(d: Draw) -> Problem:
    m1, d1, m2 = d.until(lambda: (d.whole(3, 12), d.whole(2, 9), d.whole(3, 12)), lambda v: v[0] != v[2])
    per = d.whole(5, 40)
    items = m1 * d1 * per
    d2 = d.whole(2, 9)
    want = m2 * d2 * per
    thing, made = d.pick(
        ("looms", "scarves"),
        ("printers", "posters"),
        ("ovens", "loaves"),
        ("lathes", "chair legs"),
        ("presses", "tiles"),
    )
    problem = d.pick(
        f"{m1} {thing} make {items:,} {made} in {d1} days. How many days do {m2} {thing} take for {want:,} {made}?",
        f"One workshop with {m1} {thing} turns out {items:,} {made} in {d1} days. Another has {m2} {thing} of the same kind and an order for {want:,} {made}. How long will it be busy?",
    )
    rationale = d.pick(
        f"One of the {thing} makes {items:,} / ({m1} * {d1}) = {per} {made} a day. {m2} of them make {m2} * {per} = {m2 * per}, so the order takes {want:,} / {m2 * per} = {d2} days.",
        f"Count in machine-days: {m1} * {d1} = {m1 * d1} of them give {items:,} {made}, that is {items:,} / {m1 * d1} = {per} each. The new order needs {want:,} / {per} = {m2 * d2} machine-days, and with {m2} {thing} at work these are used up in {m2 * d2} / {m2} = {d2} days.",
    )
    return Problem(problem, rationale, d2, {"m1": m1, "d1": d1, "items": items, "m2": m2, "want": want})


def provisions(d: Draw) -> Problem:
    people, days, gone, extra = d.until(
        lambda: (d.whole(10, 60), d.whole(12, 40), d.whole(2, 9), d.whole(2, 30)),
        lambda v: (v[0] * (v[1] - v[2])) % (v[0] + v[3]) == 0,
    )
    left = people * (days - gone) // (people + extra)
    place = d.pick("an island station", "a mountain hut", "a ship", "a desert camp", "a polar base")
    problem = d.pick(
        f"On {place} there is food for {people} people for {days} days. After {gone} days {extra} more people arrive. How many days will the remaining food last, at the same ration?",
        f"{people} people at {place} have stores for {days} days. When {gone} days have passed, {extra} newcomers join them. For how much longer do the stores suffice if everybody eats as before?",
    )
    rationale = d.pick(
        f"After {gone} days the stores would still feed {people} people for {days} - {gone} = {days - gone} days, which is {people} * {days - gone} = {people * (days - gone):,} daily rations. Now {people} + {extra} = {people + extra} people share them: {people * (days - gone):,} / {people + extra} = {left} days.",
        f"In rations: {people} * {days} = {people * days:,} at the start, minus {people} * {gone} = {people * gone:,} eaten, leaves {people * (days - gone):,}. For {people + extra} people that is {people * (days - gone):,} / {people + extra} = {left} days.",
    )
    return Problem(problem, rationale, left, {"people": people, "days": days, "gone": gone, "extra": extra})


def train_and_bridge(d: Draw) -> Problem:
    v, length, bridge = d.until(
        lambda: (d.whole(8, 35), d.whole(90, 320, 10), d.whole(100, 900, 10)),
        lambda x: (x[1] + x[2]) % x[0] == 0 and x[1] % x[0] == 0,
    )
    t = (length + bridge) // v
    kmh = Fraction(v * 36, 10)
    problem = d.pick(
        f"A train {length} m long crosses a bridge of {bridge} m. From the moment the engine reaches the bridge until the last wagon has left it, {t} seconds pass. What is the train's speed in km/h?",
        f"It takes {t} s for a {length} m train to clear a tunnel that is {bridge} m long (engine in to last wagon out). How fast is it, in kilometres per hour, and how long does it take to pass a signal post?",
    )
    rationale = d.pick(
        f"Between the two moments the engine travels the bridge and one train length, {bridge} + {length} = {bridge + length} m, in {t} s. That is {bridge + length} / {t} = {v} metres per second, or {v} * 3.6 = {num(kmh)} km/h. A post at the side would be passed in {length} / {v} = {length // v} s.",
        f"From entering to leaving, the train moves its own length besides the structure: {length} + {bridge} = {length + bridge} m. Speed: {length + bridge} / {t} = {v} m/s, and as 1 m/s is 3.6 km/h, {v} * 3.6 = {num(kmh)} km/h. At this speed its own {length} m take {length} / {v} = {length // v} s.",
    )
    return Problem(problem, rationale, kmh, {"t": t, "length": length, "bridge": bridge})


def fuel_for_trip(d: Draw) -> Problem:
    who, town = d.name(), d.towns(1)[0]
    use, dist, price = Fraction(d.whole(44, 92, 4), 10), d.whole(150, 900, 50), Fraction(d.whole(140, 210, 10), 100)
    litres = use * dist / 100
    cost = litres * price
    riders = d.pick(2, 4, 5)
    share = cost / riders
    if (cost * 100).denominator != 1 or (share * 100).denominator != 1:
        return fuel_for_trip(d)
    problem = d.pick(
        f"{who}'s car uses {num(use)} litres per 100 km. Fuel costs {money(price)} a litre. The trip to {town} is {dist} km, and {riders} people share the cost. How much is each share?",
        f"{riders} friends drive {dist} km to {town} in a car that needs {num(use)} litres for 100 km, with fuel at {money(price)} per litre. What does each of them pay?",
    )
    rationale = d.pick(
        f"For this trip one needs {dist} / 100 * {num(use)} = {num(litres)} litres, which cost {num(litres)} * {num(price)} = {num(cost)} dollars. Split {riders} ways that is {num(cost)} / {riders} = {num(share)}, so {money(share)} each.",
        f"One kilometre needs {num(use)} / 100 = {num(use / 100)} litres, so {dist} km need {dist} * {num(use / 100)} = {num(litres)}. At {money(price)} a litre the bill is {money(cost)}, and each of the {riders} pays {money(cost)} / {riders} = {money(share)}.",
    )
    return Problem(problem, rationale, share, {"use": use, "dist": dist, "price": price, "riders": riders})


def circular_track(d: Draw) -> Problem:
    one, two = d.names(2)
    v1, v2, lap = d.until(
        lambda: (d.whole(4, 9), d.whole(2, 8), d.whole(200, 600, 20)),
        lambda v: v[0] > v[1] and v[2] % (v[0] - v[1]) == 0 and v[2] % (v[0] + v[1]) == 0,
    )
    same, opp = lap // (v1 - v2), lap // (v1 + v2)
    problem = d.pick(
        f"{one} runs at {v1} m/s and {two} at {v2} m/s on a {lap} m circular track, starting together. After how many seconds are they level for the first time again if they run in the same direction, and if they run in opposite directions?",
        f"Two runners start at the same point of a round track of {lap} m. {one} does {v1} metres a second, {two} {v2}. When do they first meet, (i) running the same way, (ii) running opposite ways?",
    )
    rationale = d.pick(
        f"In the same direction {one} must gain a whole lap. The lead grows by {v1} - {v2} = {v1 - v2} m every second, so it takes {lap} / {v1 - v2} = {same} s. In opposite directions they cover one lap between them at {v1} + {v2} = {v1 + v2} m/s, and {lap} / {v1 + v2} = {opp} s suffice.",
        f"Only relative speed matters. Same way: {v1} - {v2} = {v1 - v2} m/s, a lap of {lap} m is gained in {lap} / {v1 - v2} = {same} s. Opposite ways: {v1} + {v2} = {v1 + v2} m/s, first meeting after {lap} / {v1 + v2} = {opp} s.",
    )
    return Problem(problem, rationale, f"{same} s, {opp} s", {"v1": v1, "v2": v2, "lap": lap, "same": same, "opp": opp})


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    two_trains_meet,
    catching_up,
    average_speed,
    river_boat,
    work_together,
    helper_leaves,
    tank_in_and_out,
    machines_and_days,
    provisions,
    train_and_bridge,
    fuel_for_trip,
    circular_track,
)
