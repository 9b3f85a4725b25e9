# DeiT-S (22 M parameters), with the weights that timm has of it.
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier',
    model_name='deit_small_patch16_224.fb_in1k',
    pretrained=True,
)
