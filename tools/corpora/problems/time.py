"""Templates about calendars, clocks, temperature and units."""
# ruff: noqa: E501 - sentences stay on one line

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from fractions import Fraction
from math import lcm

from .draw import Draw, Problem, frac, num, ordinal, plural

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def clock(minutes: int) -> str:
    """Minutes after midnight as 7:05 or 19:40, wrapped round the day."""
    return f"{minutes // 60 % 24}:{minutes % 60:02d}"


def day_of_week(d: Draw) -> Problem:
    start, n = d.whole(0, 6), d.until(lambda: d.whole(40, 900), lambda k: k % 7 > 0)
    end = (start + n) % 7
    event = d.pick("A ship sails", "A comet was first seen", "A bridge is opened", "A bean is planted", "A play opens")
    problem = d.pick(
        f"{event} on a {DAYS[start]}. Which day of the week is it {n} days later?",
        f"Today is {DAYS[start]}. Which day of the week will it be {n} days from now?",
        f"If an instalment is due {n} days after a {DAYS[start]}, on which weekday must it be paid?",
    )
    r = n % 7
    rationale = d.pick(
        f"Every 7 days the weekday repeats. Since {n} = {n // 7} * 7 + {r}, the weekday moves on by {plural(r, 'day')}, from {DAYS[start]} to {DAYS[end]}.",
        f"Divide by the length of a week: {n} = 7 * {n // 7} + {r}. The {n // 7} full weeks change nothing. Counting {r} further from {DAYS[start]}, we arrive at {DAYS[end]}.",
    )
    return Problem(problem, rationale, DAYS[end], {"start": start, "n": n})


def days_between(d: Draw) -> Problem:
    year = d.whole(2001, 2031)
    first = date(year, d.whole(1, 6), d.whole(1, 28))
    second = date(year, d.whole(first.month + 2, 12), d.whole(1, 28))
    n = (second - first).days
    leap = year % 4 == 0
    rest = (date(first.year, first.month + 1, 1) - first).days
    parts, month = [rest], first.month + 1
    while month < second.month:
        parts.append(((date(year, month + 1, 1)) - date(year, month, 1)).days)
        month += 1
    parts.append(second.day - 1)
    names = f"{MONTHS[first.month - 1]} {first.day}", f"{MONTHS[second.month - 1]} {second.day}"
    between = [MONTHS[m - 1] for m in range(first.month + 1, second.month)]
    problem = d.pick(
        f"How many days lie between {names[0]} and {names[1]} of the year {year}, counting the last day but not the first?",
        f"A loan runs from {names[0]}, {year}, to {names[1]} of the same year. For how many days is it charged, if the first day is not counted?",
    )
    leap_note = (
        f" ({year} is {'a leap year, so February has 29 days' if leap else 'not a leap year, so February has 28 days'}.)"
        if "February" in between
        else ""
    )
    rationale = d.pick(
        f"To the first of {MONTHS[first.month]} it is {plural(rest, 'day')}. The full months that follow ({', '.join(between)}) have {' + '.join(map(str, parts[1:-1]))} = {sum(parts[1:-1])} days, and from {MONTHS[second.month - 1]} 1 to {MONTHS[second.month - 1]} {second.day} there {'is' if parts[-1] == 1 else 'are'} {parts[-1]} more. Altogether {rest} + {sum(parts[1:-1])} + {parts[-1]} = {n}.{leap_note}",
        f"Number the days of the year. {names[0]} is day {first.timetuple().tm_yday} and {names[1]} is day {second.timetuple().tm_yday}. The difference is {second.timetuple().tm_yday} - {first.timetuple().tm_yday} = {n} days.{leap_note}",
    )
    return Problem(
        problem, rationale, n, {"year": year, "m1": first.month, "d1": first.day, "m2": second.month, "d2": second.day}
    )


def month_weekday(d: Draw) -> Problem:
    year, month = d.whole(1995, 2035), d.whole(1, 12)
    given, ask = d.until(lambda: d.sample(list(range(1, 29)), 2), lambda v: (v[0] - v[1]) % 7 > 0)
    w = date(year, month, given).weekday()
    result = date(year, month, ask).weekday()
    diff = ask - given
    back = abs(diff)
    nth = (ask - 1) // 7 + 1
    problem = d.pick(
        f"In some month the {ordinal(given)} is a {DAYS[w]}. Which day of the week is the {ordinal(ask)} of that month, and is it the first, second, third or fourth such day in it?",
        f"The {ordinal(given)} of a month falls on a {DAYS[w]}. Find the weekday of the {ordinal(ask)} and say which of its kind it is in the month.",
    )
    word = ("first", "second", "third", "fourth")[nth - 1]
    rationale = d.pick(
        f"From the {ordinal(given)} to the {ordinal(ask)} are {back} days {'forwards' if diff > 0 else 'backwards'}, and {back} = {back // 7} * 7 + {back % 7}. So we move {plural(back % 7, 'day')} {'on' if diff > 0 else 'back'} from {DAYS[w]} and get {DAYS[result]}. Days {7 * nth - 6} to {7 * nth} contain the {word} one of each weekday, so it is the {word} {DAYS[result]}.",
        f"Leaving out whole weeks, {back} days count like {back % 7}. {DAYS[w]} {'plus' if diff > 0 else 'minus'} {back % 7} is {DAYS[result]}. Earlier {DAYS[result]}s of the month: {', '.join(ordinal(k) for k in range(ask - 7 * (nth - 1), ask, 7)) or 'none'}; hence this is the {word}.",
    )
    return Problem(problem, rationale, f"{DAYS[result]}, {word}", {"given": given, "ask": ask, "weekday": w})


def timetable(d: Draw) -> Problem:
    x, y = d.towns(2)
    start, legs = d.whole(5 * 60, 20 * 60), [d.whole(25, 150), d.whole(20, 140)]
    wait = d.whole(6, 45)
    total = sum(legs) + wait
    change, again, end = start + legs[0], start + legs[0] + wait, start + total
    problem = d.pick(
        f"One train leaves {x} at {clock(start)} and after {legs[0]} minutes reaches the junction, where one waits {wait} minutes for the connection. The second train takes {legs[1]} minutes to {y}. When does one arrive, and how long is the whole journey?",
        f"Leaving {x} at {clock(start)}, a traveller rides {legs[0]} minutes, waits {wait} minutes and rides {legs[1]} minutes more to {y}. Find the time of arrival and the total time in hours and minutes.",
    )
    rationale = d.pick(
        f"The first train arrives at {clock(change)}, the connection leaves at {clock(again)} and reaches {y} at {clock(end)}. The journey lasts {legs[0]} + {wait} + {legs[1]} = {total} minutes, which is {plural(total // 60, 'hour')} and {plural(total % 60, 'minute')}.",
        f"Adding the parts, {legs[0]} + {wait} + {legs[1]} = {total} minutes, or {total // 60} h {total % 60} min because {total // 60} * 60 + {total % 60} = {total}. Counted from {clock(start)} this ends at {clock(end)}.",
    )
    return Problem(problem, rationale, clock(end), {"start": start, "first": legs[0], "wait": wait, "second": legs[1]})


def clock_angle(d: Draw) -> Problem:
    h, m = d.whole(2, 11), d.whole(2, 58, 2)
    hour, minute = Fraction(30 * h) + Fraction(m, 2), Fraction(6 * m)
    gap = abs(hour - minute)
    angle = min(gap, 360 - gap)
    who = d.name()
    problem = d.pick(
        f"What is the smaller angle between the hands of a clock at {h}:{m:02d}?",
        f"{who} looks at a clock with hands when it is {h}:{m:02d}. Which angle, at most 180 degrees, do the two hands form?",
    )
    rationale = d.pick(
        f"Think of both hands from twelve on. The minute hand moves 6 degrees a minute and stands at {m} * 6 = {num(minute)} degrees. The hour hand moves half a degree a minute; at {h}:{m:02d} it stands at {h} * 30 + {m} / 2 = {num(hour)} degrees. They differ by {num(gap)} degrees{'' if gap <= 180 else f', and the smaller angle is 360 - {num(gap)} = {num(angle)} degrees'}.",
        f"Measure from twelve. Hour hand: 30 degrees for each of {h} hours and 0.5 for each of {m} minutes, {30 * h} + {num(Fraction(m, 2))} = {num(hour)}. Minute hand: 6 * {m} = {num(minute)}. The difference is {num(max(hour, minute))} - {num(min(hour, minute))} = {num(gap)} degrees{', which is already the smaller angle' if gap <= 180 else f'; the other way round it is 360 - {num(gap)} = {num(angle)}, the smaller one'}.",
    )
    return Problem(problem, rationale, angle, {"h": h, "m": m})


def slow_clock(d: Draw) -> Problem:
    rate, hours, start = d.whole(2, 9), d.whole(5, 40), d.whole(6, 20)
    fast = d.pick(True, False)
    shift = rate * hours if fast else -rate * hours
    shown = start * 60 + hours * 60 + shift
    what = d.pick("wall clock", "wristwatch", "kitchen clock", "station clock", "grandfather clock")
    verb = "gains" if fast else "loses"
    problem = d.pick(
        f"An old {what} {verb} {rate} minutes every hour. It is set right at {start}:00. What does it show {hours} hours later?",
        f"Set correctly at {start}:00, a {what} that {verb} {rate} minutes an hour is looked at after exactly {hours} hours. Which time can be read from it (24-hour reading)?",
    )
    true = start * 60 + hours * 60
    later = plural(true // 1440, "day")
    rationale = d.pick(
        f"The true time is then {clock(true)}{f', {later} on' if true >= 1440 else ''}. In {hours} hours the error grows to {hours} * {rate} = {abs(shift)} minutes, that is {abs(shift) // 60} h {abs(shift) % 60} min. The {what} is {'ahead' if fast else 'behind'} by this much and shows {clock(shown)}.",
        f"For every true hour the {what} advances 60 {'+' if fast else '-'} {rate} = {60 + rate if fast else 60 - rate} minutes. In {hours} hours that makes {hours} * {60 + rate if fast else 60 - rate} = {hours * (60 + rate if fast else 60 - rate)} minutes, or {hours * (60 + rate if fast else 60 - rate) // 60} h {hours * (60 + rate if fast else 60 - rate) % 60} min. Added to {start}:00 it gives {clock(shown)}.",
    )
    return Problem(problem, rationale, clock(shown), {"rate": rate, "hours": hours, "start": start, "fast": int(fast)})


def temperature(d: Draw) -> Problem:
    c = d.whole(-30, 45, 5)
    step = d.whole(5, 35, 5)
    f = c * 9 // 5 + 32
    c2 = c + step
    f2 = c2 * 9 // 5 + 32
    who = d.name()
    problem = d.pick(
        f"{who} reads {f} degrees Fahrenheit in the morning. By noon it is {step} Celsius degrees warmer. What is the noon temperature on both scales?",
        f"Outdoors a thermometer shows {f} degrees Fahrenheit. Convert this to Celsius, add {step} Celsius degrees and convert back.",
    )
    rationale = d.pick(
        f"To Celsius: ({f} - 32) * 5/9 = {c} degrees. After warming, {c} + {step} = {c2} degrees Celsius. Back to Fahrenheit: {c2} * 9/5 + 32 = {f2} degrees.",
        f"A rise of {step} Celsius degrees is a rise of {step} * 9/5 = {step * 9 // 5} Fahrenheit degrees, so noon has {f} + {step * 9 // 5} = {f2} degrees Fahrenheit. In Celsius that is ({f2} - 32) * 5/9 = {c2} degrees.",
    )
    return Problem(problem, rationale, f"{c2} C, {f2} F", {"f": f, "step": step})


def speed_units(d: Draw) -> Problem:
    ms = d.whole(3, 15)
    kmh = Fraction(ms * 18, 5)
    beast, other = d.pick(
        ("cheetah", "antelope"), ("cyclist", "tram"), ("gull", "ferry"), ("skater", "bus"), ("hare", "fox")
    )
    diff = d.until(lambda: d.whole(-9, 9), lambda v: v != 0)
    their = kmh + diff
    secs = d.whole(5, 30)
    metres = ms * secs
    faster = beast if diff < 0 else other
    problem = d.pick(
        f"A {beast} covers {metres} m in {secs} seconds; {'an' if other[0] == 'a' else 'a'} {other} moves at {num(their)} km/h. Which is faster, and by how many km/h?",
        f"In {secs} s a {beast} travels {metres} m. Compare its speed with the {num(their)} km/h of {'an' if other[0] == 'a' else 'a'} {other}.",
    )
    rationale = d.pick(
        f"{metres} / {secs} = {ms} metres per second. An hour has 3,600 seconds, so that is {ms} * 3,600 = {ms * 3600:,} m or {num(kmh)} km per hour. Against {num(their)} km/h the {faster} is faster, by {num(max(kmh, their))} - {num(min(kmh, their))} = {abs(diff)} km/h.",
        f"Metres per second become kilometres per hour when multiplied by 3.6. The {beast} does {metres} / {secs} = {ms} m/s, which is {ms} * 3.6 = {num(kmh)} km/h. The difference from {num(their)} km/h is {abs(diff)} km/h in favour of the {faster}.",
    )
    return Problem(problem, rationale, abs(diff), {"ms": ms, "secs": secs, "metres": metres, "their": their})


def dripping_tap(d: Draw) -> Problem:
    drops, per_ml, hours = d.pick(20, 24, 30, 40, 45, 60), d.pick(15, 20), d.pick(8, 10, 12, 24, 36, 48)
    ml = Fraction(drops * 60 * hours, per_ml)
    litres = ml / 1000
    days = d.whole(5, 30)
    per_day = Fraction(drops * 60 * 24, per_ml) / 1000
    problem = d.pick(
        f"Somewhere a tap loses {drops} drops a minute, and {per_ml} drops make one millilitre. How many litres are lost in {hours} hours, and how many in {days} days?",
        f"Water drips from a pipe at {drops} drops per minute. If {per_ml} drops fill a millilitre, find the loss in litres over {hours} hours and over {days} days.",
    )
    rationale = d.pick(
        f"In an hour {drops} * 60 = {drops * 60:,} drops fall, which is {drops * 60:,} / {per_ml} = {num(Fraction(drops * 60, per_ml))} ml. For {hours} hours: {hours} * {num(Fraction(drops * 60, per_ml))} = {num(ml)} ml, that is {num(litres)} litres. A day has 24 hours, so {days} days lose {days} * 24 * {num(Fraction(drops * 60, per_ml))} = {num(per_day * days * 1000)} ml or {num(per_day * days)} litres.",
        f"Each minute loses {drops}/{per_ml}{'' if frac(Fraction(drops, per_ml)) == f'{drops}/{per_ml}' else f' = {frac(Fraction(drops, per_ml))}'} ml. Over {hours} * 60 = {hours * 60:,} minutes this is {num(ml)} ml, or {num(litres)} litres. One day, 1,440 minutes, takes {num(per_day)} litres, and {days} days take {days} * {num(per_day)} = {num(per_day * days)} litres.",
    )
    return Problem(problem, rationale, litres, {"drops": drops, "per_ml": per_ml, "hours": hours, "days": days})


def leap_years(d: Draw) -> Problem:
    first = d.whole(1860, 1990)
    last = first + d.whole(60, 260)
    div4 = last // 4 - (first - 1) // 4
    div100 = last // 100 - (first - 1) // 100
    div400 = last // 400 - (first - 1) // 400
    leaps = div4 - div100 + div400
    days = 365 * (last - first + 1) + leaps
    problem = d.pick(
        f"How many leap years are there from {first} to {last}, both included, and how many days do all these years have?",
        f"In the Gregorian calendar, count the leap years among the years {first} to {last} (inclusive). How many days is the whole span?",
    )
    years = last - first + 1
    rationale = d.pick(
        f"Every fourth year is a leap year, except full centuries not divisible by 400. Divisible by 4 are {last // 4} - {(first - 1) // 4} = {div4} of the years, by 100 {last // 100} - {(first - 1) // 100} = {div100}, by 400 {last // 400} - {(first - 1) // 400} = {div400}. So there are {div4} - {div100} + {div400} = {leaps} leap years. The span has {last} - {first} + 1 = {years} years and {years} * 365 + {leaps} = {days:,} days.",
        f"There are {years} years, of which {div4} are multiples of 4. Take off the {div100} multiples of 100 and put back the {div400} divisible by 400: {div4} - {div100} + {div400} = {leaps}. With 365 days each and one more in a leap year that makes {years * 365:,} + {leaps} = {days:,} days.",
    )
    return Problem(problem, rationale, leaps, {"first": first, "last": last, "days": days})


def shift_calendar(d: Draw) -> Problem:
    one, two = d.names(2)
    p, q = d.until(lambda: (d.whole(3, 10), d.whole(4, 12)), lambda v: v[0] != v[1])
    m = lcm(p, q)
    start = date(d.whole(2015, 2030), d.whole(1, 11), d.whole(1, 28))
    end = start + timedelta(days=m)
    job = d.pick("night duty", "laundry day", "a day off", "a dance class", "kitchen duty")
    problem = d.pick(
        f"{one} has {job} every {p} days and {two} every {q} days. On {MONTHS[start.month - 1]} {start.day}, {start.year}, a {DAYS[start.weekday()]}, both have it. On which date, and on which weekday, does this happen next?",
        f"Every {p} days {one} has {job}; for {two} it is every {q} days. Both had it on {DAYS[start.weekday()]}, {MONTHS[start.month - 1]} {start.day}, {start.year}. What is the next common date?",
    )
    rationale = d.pick(
        f"Their intervals coincide after the least common multiple of {p} and {q}, which is {m} days. Counting {m} days on from {MONTHS[start.month - 1]} {start.day} leads to {MONTHS[end.month - 1]} {end.day}, {end.year}. Because {m} = {m // 7} * 7 + {m % 7}, the weekday {'stays ' + DAYS[end.weekday()] if m % 7 == 0 else 'changes from ' + DAYS[start.weekday()] + ' to ' + DAYS[end.weekday()]}.",
        f"Multiples of {max(p, q)} that {min(p, q)} divides too begin with {m}. So {m} days must pass: that is {MONTHS[end.month - 1]} {end.day}, {end.year}. Its weekday, {m % 7} after {DAYS[start.weekday()]}, is {DAYS[end.weekday()]}.",
    )
    return Problem(
        problem, rationale, f"{end.isoformat()}, {DAYS[end.weekday()]}", {"p": p, "q": q, "start": start.isoformat()}
    )


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    day_of_week,
    days_between,
    month_weekday,
    timetable,
    clock_angle,
    slow_clock,
    temperature,
    speed_units,
    dripping_tap,
    leap_years,
    shift_calendar,
)
