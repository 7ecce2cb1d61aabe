from hypothesis import settings

settings.register_profile("data", deadline=None)  # a busy machine is no failure
settings.load_profile("data")
