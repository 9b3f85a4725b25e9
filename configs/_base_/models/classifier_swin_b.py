# Swin-B (88 M parameters), pre-trained on ImageNet-22k, with the weights that timm has of it.
model = dict(
    type='gplq.plugins.fgvc.TimmClassifier',
    model_name='swin_base_patch4_window7_224.ms_in22k_ft_in1k',
    pretrained=True,
)
