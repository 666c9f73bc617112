import cProfile, pstats
def test_a(make_trainer):
    tr=make_trainer(max_steps=6); tr.train()
    tr=make_trainer(max_steps=6, save_strategy="no")
    p=cProfile.Profile(); p.enable(); tr.train(); p.disable()
    pstats.Stats(p).sort_stats("cumtime").print_stats(45)
