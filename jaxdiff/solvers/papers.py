"""The papers that the solvers come from, and their BibTeX."""

from collections.abc import Mapping
from typing import NamedTuple


class Paper(NamedTuple):
    """Authors as "Family, Given and ...", as BibTeX wants them; arXiv's number where there is one."""

    authors: str
    year: int
    title: str
    short: str
    arxiv: str | None = None
    journal: str | None = None

    @property
    def reference(self) -> str:
        """One line: first author, year, short title, number."""
        first, *others = self.authors.split(" and ")
        names = first.split(",")[0] + (" et al." if len(others) > 1 else "")
        if len(others) == 1:
            names += " & " + others[0].split(",")[0]
        where = f", arXiv:{self.arxiv}" if self.arxiv else f", {self.journal}"
        return f"{names} {self.year}, {self.short}{where}"

    def bibtex(self, key: str) -> str:
        """The BibTeX entry under `key`."""
        lines = [f"  title={{{self.title}}}", f"  author={{{self.authors}}}", f"  year={{{self.year}}}"]
        where = self.journal or f"arXiv:{self.arxiv}"
        lines.append(f"  journal={{{where}}}")
        return f"@article{{{key},\n" + ",\n".join(lines) + "\n}"


PAPERS: Mapping[str, Paper] = {
    "ddpm": Paper(
        "Ho, Jonathan and Jain, Ajay and Abbeel, Pieter", 2020,
        "Denoising Diffusion Probabilistic Models", "DDPM", "2006.11239",
    ),
    "ddim": Paper(
        "Song, Jiaming and Meng, Chenlin and Ermon, Stefano", 2021,
        "Denoising Diffusion Implicit Models", "DDIM", "2010.02502",
    ),
    "edm": Paper(
        "Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli", 2022,
        "Elucidating the Design Space of Diffusion-Based Generative Models", "EDM", "2206.00364",
    ),
    "dpm_solver": Paper(
        "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun",
        2022,
        "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
        "DPM-Solver", "2206.00927",
    ),
    "dpm_solver_pp": Paper(
        "Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun",
        2022,
        "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
        "DPM-Solver++", "2211.01095",
    ),
    "dpm_solver_v3": Paper(
        "Zheng, Kaiwen and Lu, Cheng and Chen, Jianfei and Zhu, Jun", 2023,
        "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics",
        "DPM-Solver-v3", "2310.13268",
    ),
    "unipc": Paper(
        "Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen", 2023,
        "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
        "UniPC", "2302.04867",
    ),
    "k_diffusion": Paper(
        "Crowson, Katherine", 2022, "k-diffusion", "k-diffusion",
        journal="https://github.com/crowsonkb/k-diffusion",
    ),
    "deis": Paper(
        "Zhang, Qinsheng and Chen, Yongxin", 2023,
        "Fast Sampling of Diffusion Models with Exponential Integrator", "DEIS", "2204.13902",
    ),
    "pndm": Paper(
        "Liu, Luping and Ren, Yi and Lin, Zhijie and Zhao, Zhou", 2022,
        "Pseudo Numerical Methods for Diffusion Models on Manifolds", "PNDM", "2202.09778",
    ),
    "ghvb": Paper(
        "Wizadwongsa, Suttisak and Chinchuthakun, Worameth and Khungurn, Pramook and Raj, Amit "
        "and Suwajanakorn, Supasorn", 2024,
        "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts", "GHVB", "2307.11118",
    ),
    "bdia": Paper(
        "Zhang, Guoqiang and Lewis, J. P. and Kleijn, W. Bastiaan", 2024,
        "Exact Diffusion Inversion via Bi-directional Integration Approximation", "BDIA",
        "2307.10829",
    ),
    "belm": Paper(
        "Wang, Fangyikang and Yin, Hubery and Dong, Yue-Jiang and Zhu, Huminhao and Zhang, Chao and "
        "Zhao, Hanbin and Qian, Hui and Li, Chen", 2024,
        "BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in Diffusion Models",
        "BELM", "2410.07273",
    ),
    "edict": Paper(
        "Wallace, Bram and Gokul, Akash and Naik, Nikhil", 2023,
        "EDICT: Exact Diffusion Inversion via Coupled Transformations", "EDICT", "2211.12446",
    ),
    "dual_fast": Paper(
        "Yu, Hu and Luo, Hao and Wang, Fan and Zhao, Feng", 2025,
        "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models", "DualFast",
        "2506.13058",
    ),
    "exponential_rk": Paper(
        "Zhang, Qinsheng and Song, Jiaming and Chen, Yongxin", 2023,
        "Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling",
        "RES", "2308.02157",
    ),
    "restart": Paper(
        "Xu, Yilun and Deng, Mingyang and Cheng, Xiang and Tian, Yonglong and Liu, Ziming and "
        "Jaakkola, Tommi", 2023,
        "Restart Sampling for Improving Generative Processes", "Restart", "2306.14878",
    ),
    "seeds": Paper(
        "Gonzalez, Martin and Fernandez Pinto, Nelson and Tran, Thuy and Gherbi, Elies and Hajri, Hatem "
        "and Masmoudi, Nader", 2023,
        "SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models",
        "SEEDS", "2305.14267",
    ),
    "sa_solver": Paper(
        "Xue, Shuchen and Yi, Mingyang and Luo, Weijian and Zhang, Shifeng and Sun, Jiacheng and "
        "Li, Zhenguo and Ma, Zhi-Ming", 2023,
        "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", "SA-Solver",
        "2309.05019",
    ),
    "er_sde": Paper(
        "Cui, Qinpeng and Zhang, Xinyi and Lu, Zongqing and Liao, Qingmin", 2023,
        "Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models",
        "ER-SDE-Solver", "2309.06169",
    ),
    "ncsn": Paper(
        "Song, Yang and Ermon, Stefano", 2019,
        "Generative Modeling by Estimating Gradients of the Data Distribution", "NCSN",
        "1907.05600",
    ),
    "score_sde": Paper(
        "Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P. and Kumar, Abhishek and "
        "Ermon, Stefano and Poole, Ben", 2021,
        "Score-Based Generative Modeling through Stochastic Differential Equations", "score SDE",
        "2011.13456",
    ),
    "gddim": Paper(
        "Zhang, Qinsheng and Tao, Molei and Chen, Yongxin", 2022,
        "gDDIM: Generalized Denoising Diffusion Implicit Models", "gDDIM", "2206.05564",
    ),
    "consistency": Paper(
        "Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya", 2023,
        "Consistency Models", "Consistency Models", "2303.01469",
    ),
    "lcm": Paper(
        "Luo, Simian and Tan, Yiqin and Huang, Longbo and Li, Jian and Zhao, Hang", 2023,
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        "LCM", "2310.04378",
    ),
    "tcd": Paper(
        "Zheng, Jianbin and Hu, Minghui and Fan, Zhongyi and Wang, Chaoyue and Ding, Changxing "
        "and Tao, Dacheng and Cham, Tat-Jen", 2024,
        "Trajectory Consistency Distillation", "TCD", "2402.19159",
    ),
    "rectified_flow": Paper(
        "Liu, Xingchao and Gong, Chengyue and Liu, Qiang", 2023,
        "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        "rectified flow", "2209.03003",
    ),
}  # fmt: skip
