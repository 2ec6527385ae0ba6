SETTINGS = {"experts": 8}
EXPERTS = SETTINGS["expert"]
