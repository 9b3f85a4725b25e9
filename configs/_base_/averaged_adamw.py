# To stand in place of schedule_adamw.py's cosine to zero: weights averaged over some 250 steps, and a rate that ends at
# a fifth, so that there is something to average.
average = dict(type='EMAHook', momentum=0.004)
cosine_to_a_fifth = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(
        type='CosineAnnealingLR',
        by_epoch=True,
        begin=0,
        end=40,
        T_max=40,
        eta_min_ratio=0.2,
        convert_to_iter_based=True,
    ),
]
