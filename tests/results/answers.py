"""What the numbers say of six claims, in English and Chinese; tables.py fills in every figure.

{acc NAME}        accuracy with its interval; of several seeds the mean's
{auc NAME}        likewise AUC, by DeLong
{auc NAME WORDS}  AUC with other label words, from a row with --label-sets; Hanley and McNeil's
{each NAME}       accuracy of each seed
{diff A B}        accuracy of A minus that of B, clean rows: paired interval, McNemar's p by seed
{aucdiff A B}     the same of AUC, without a test
{off NAME}        share of generated answers without a label word
{said NAME WORDS} share of those that hold these other words
{steps NAME}      steps taken where it was measured (of two checkpoints the better one)
{moved NAME WHAT} how far token vectors went, in parts of their length
"""

# Claim, then what the numbers show and what they do not.
ENGLISH = (
    (
        "A head on a frozen base fails (0.512).",
        "No. A probe on the frozen base gets {acc head_only}, against zero-shot "
        "{diff head_only zero_shot}; with the layer that the held-out part chose "
        "{acc head_only-best}, with mean pooling {acc head_only-mean}, on 1.5B "
        "{acc 1.5b/head_only}. The diary's row was another thing: `lora_head`'s head moved onto "
        "the bare base. That loses here too, {diff transplanted_head lora_head}, and how much is a "
        "matter of the seed: {each transplanted_head}, the last as near to chance as the diary's. "
        "It is the threshold more than the ranking: AUC {auc transplanted_head}. What also fails "
        "is a head that has taken few steps at this learning rate: `lora_head` on 50 rows, "
        "{steps lora_head-n50} steps, gets {acc lora_head-n50}, a probe solved on the same rows "
        "{acc head_only-n50}. Not tested: the diary's own model and head, whose AUC fell as well.",
    ),
    (
        "LoRA changes the distribution of the hidden states, and head and LoRA cannot be taken "
        "apart.",
        "Half of it. The head trained with LoRA does not fit the bare base, where a head of its "
        "own would do better: {diff transplanted_head head_only}. But LoRA's states need no head "
        "of their own making: a probe solved anew on them gets {acc probe-of-lora_head}, against "
        "the head that was trained with them {diff probe-of-lora_head lora_head}; on the base that "
        "label scoring adapted, where no head was ever trained, {acc probe-of-lora_label_scoring}. "
        "Either way LoRA's states rank better than the base's: AUC "
        "{aucdiff probe-of-lora_head head_only} and "
        "{aucdiff probe-of-lora_label_scoring head_only}. Not tested: how far the states moved; "
        "only what a linear head can read in them.",
    ),
    (
        "Label scoring beats the head, by two points.",
        "Not with 3,000 rows: {diff lora_label_scoring lora_head}, an interval that leaves two "
        "points out. With 50 and 200 rows it beats `lora_head` by far, "
        "{diff lora_label_scoring-n50 lora_head-n50} and "
        "{diff lora_label_scoring-n200 lora_head-n200}, but that is a head which has hardly left "
        "chance; label scoring has then hardly left zero-shot, "
        "{diff lora_label_scoring-n50 zero_shot} and {diff lora_label_scoring-n200 zero_shot}, and "
        "against a probe on the same 200 rows it is behind, "
        "{diff lora_label_scoring-n200 head_only-n200}. What label scoring has is a "
        "better start. Not tested: more than one epoch, where few rows would also give many steps.",
    ),
    (
        "The choice of label words shifts zero-shot.",
        "Yes. With 消极/积极 accuracy is {acc zero_shot-xiaoji}, against 负面/正面 "
        "{diff zero_shot-xiaoji zero_shot}; that is the threshold alone and not the ranking, whose "
        "AUC differs by {aucdiff zero_shot-xiaoji zero_shot}. 差/好, "
        "{aucdiff zero_shot-chahao zero_shot}, and 负向/正向, {aucdiff zero_shot-xiang zero_shot}, "
        "rank worse too. Training leaves little of that: `lora_label_scoring` with 负向/正向 gets "
        "{acc lora_label_scoring-xiang}, against 负面/正面 "
        "{diff lora_label_scoring-xiang lora_label_scoring}, which does not stand up to the number "
        "of tests. Not tested: which words are best; these four pairs were fixed beforehand.",
    ),
    (
        "Training the embedding would revive even a bare head, by dragging the label's meaning "
        "rather than by understanding.",
        "There is nothing to revive: a head with the embedding trained under it, without LoRA, "
        "gets {acc embeddings-head}, against the probe on the frozen base "
        "{diff embeddings-head head_only}. Label scoring with the embedding alone trained gets "
        "{acc embeddings-words}, against LoRA {diff embeddings-words lora_label_scoring} (both "
        "trained together: {acc embeddings-lora-words}). The label words' vectors were dragged, by "
        "{moved embeddings-words 负面} and {moved embeddings-words 正面} of their length (the "
        "texts' own tokens by {moved embeddings-words others}), but little of the gain hangs on "
        "them: set back to the base's they leave {acc embeddings-words-others}, against all "
        "vectors {diff embeddings-words-others embeddings-words}; they alone, on the base, make "
        "{acc embeddings-words-labels}, against zero-shot "
        "{diff embeddings-words-labels zero_shot}. And words that were never "
        "trained on rank far better as well: 负向/正向 from an AUC of {auc zero_shot 负向,正向} to "
        "{auc embeddings-words 负向,正向}. Not tested: understanding, which no accuracy measures.",
    ),
    (
        "Generating instead of scoring goes off track.",
        "By the letter, with the plain prompt: {off zero_shot_generate} of the answers hold "
        "neither 负面 nor 正面 in their first 16 tokens; but {said zero_shot_generate 消极,积极} "
        "of those say 积极 or 消极 instead. Where a question in the model's own markup names the "
        "two words, {off zero_shot_generate-chat} do, and accuracy is "
        "{acc zero_shot_generate-chat}, as by scoring that prompt, "
        "{diff zero_shot_generate-chat zero_shot-chat}, but worse than "
        "by scoring the plain one: {diff zero_shot-chat zero_shot}. Not tested: whether the markup "
        "or the question did it; sampled text, since decoding was greedy.",
    ),
)
CHINESE = (
    (
        "在冻结的底座上，分类头行不通（0.512）。",
        "不成立。冻结底座上的线性探针准确率为 {acc head_only}，"
        "与零样本相比 {diff head_only zero_shot}；换用留出部分选出的层为 {acc head_only-best}，"
        "换用平均池化为 {acc head_only-mean}，换用 1.5B 模型为 {acc 1.5b/head_only}。"
        "日记里那一行量的是另一回事：把 `lora_head` 的分类头搬到没有 LoRA 的底座上。"
        "这样做在这里也会掉准确率，与 `lora_head` 相比 {diff transplanted_head lora_head}，"
        "掉多少要看随机种子：三个种子分别为 {each transplanted_head}，"
        "最后一个和日记里的一样接近随机猜测。"
        "问题更多出在阈值，而不是排序：AUC 仍有 {auc transplanted_head}。"
        "同样行不通的，还有在这个学习率下步数太少的分类头："
        "`lora_head` 只用 50 条训练、走 {steps lora_head-n50} 步，准确率为 {acc lora_head-n50}；"
        "用同样 50 条求解的探针为 {acc head_only-n50}。"
        "没有验证的是：日记自己的模型和分类头，其 AUC 也下降了。",
    ),
    (
        "LoRA 改变了隐状态的分布，分类头和 LoRA 拆不开。",
        "只对一半。和 LoRA 一起训练的分类头确实不适合没有 LoRA 的底座，"
        "不如直接在这个底座上求解的探针：{diff transplanted_head head_only}。"
        "但 LoRA 之后的隐状态并不是非这个分类头不可：在其上重新求解的探针准确率为 "
        "{acc probe-of-lora_head}，与一起训练的分类头相比 {diff probe-of-lora_head lora_head}；"
        "换成标签打分训练出的 LoRA（从未训练过分类头），探针为 "
        "{acc probe-of-lora_label_scoring}。这两种 LoRA 之后的隐状态都比底座的更利于排序："
        "与冻结底座上的探针相比，AUC 分别差 {aucdiff probe-of-lora_head head_only} 和 "
        "{aucdiff probe-of-lora_label_scoring head_only}。"
        "没有验证的是：隐状态移动了多远；这里只看线性分类头能从中读出什么。",
    ),
    (
        "标签打分比分类头高两个百分点。",
        "用 3,000 条训练时不成立：与 `lora_head` 相比 {diff lora_label_scoring lora_head}，"
        "区间不含两个百分点。只用 50 条和 200 条时，它比 `lora_head` 高得多："
        "{diff lora_label_scoring-n50 lora_head-n50} 和 "
        "{diff lora_label_scoring-n200 lora_head-n200}，但那时分类头几乎还在随机猜测，"
        "标签打分也几乎还停在零样本的水平：与零样本相比 "
        "{diff lora_label_scoring-n50 zero_shot} 和 {diff lora_label_scoring-n200 zero_shot}；"
        "同样用 200 条训练，它不如探针：{diff lora_label_scoring-n200 head_only-n200}。"
        "标签打分的优势在于起点更高。没有验证的是：多训练几个 epoch 会怎样，"
        "那样即使数据少，步数也不会少。",
    ),
    (
        "标签词的选择会左右零样本的结果。",
        "成立。用“消极/积极”时准确率为 {acc zero_shot-xiaoji}，与用“负面/正面”相比 "
        "{diff zero_shot-xiaoji zero_shot}；变的只是阈值，排序能力没有变，AUC 之差为 "
        "{aucdiff zero_shot-xiaoji zero_shot}。“差/好”和“负向/正向”连排序也更差，AUC 分别差 "
        "{aucdiff zero_shot-chahao zero_shot} 和 {aucdiff zero_shot-xiang zero_shot}。"
        "训练之后差别所剩无几：`lora_label_scoring` 用“负向/正向”时准确率为 "
        "{acc lora_label_scoring-xiang}，与用“负面/正面”相比 "
        "{diff lora_label_scoring-xiang lora_label_scoring}，按检验次数校正后不显著。"
        "没有验证的是：哪些词最好；这四对词是事先定好的。",
    ),
    (
        "训练词向量（embedding）能让没有 LoRA 的分类头也活过来，"
        "但靠的是拖动标签词的含义，而不是理解。",
        "本来就没有什么需要“活过来”：不用 LoRA、只训练词向量和分类头，准确率为 "
        "{acc embeddings-head}，与冻结底座上的探针相比 {diff embeddings-head head_only}。"
        "标签打分不用 LoRA、只训练词向量，准确率为 {acc embeddings-words}，与用 LoRA 时相比 "
        "{diff embeddings-words lora_label_scoring}（两者一起训练：{acc embeddings-lora-words}）。"
        "标签词的向量确实被拖动了：“负面”和“正面”的移动量分别是自身长度的 "
        "{moved embeddings-words 负面} 和 {moved embeddings-words 正面} 倍"
        "（训练提示词里的其他 token 平均 {moved embeddings-words others} 倍），"
        "但提升主要不靠它们：把这两个词的向量还原成底座的，准确率仍有 "
        "{acc embeddings-words-others}，与不还原时相比 "
        "{diff embeddings-words-others embeddings-words}；"
        "反过来，只保留这两个词训练后的向量、其余全部还原，准确率为 "
        "{acc embeddings-words-labels}，与零样本相比 {diff embeddings-words-labels zero_shot}。"
        "没有用来训练的标签词，排序也好了很多：“负向/正向”的 AUC 从 "
        "{auc zero_shot 负向,正向} 升到 {auc embeddings-words 负向,正向}。"
        "没有验证的是：模型是否“理解”，准确率量不出这一点。",
    ),
    (
        "不打分而让模型直接生成，会跑题。",
        "用普通提示词时，字面上成立：有 {off zero_shot_generate} 的回答在前 16 个 token 里"
        "既没有“负面”也没有“正面”；但这些回答里有 {said zero_shot_generate 消极,积极} "
        "改说了“积极”或“消极”。改用模型自带的对话格式（chat template）提问并点明这两个词，"
        "跑题的比例为 {off zero_shot_generate-chat}，准确率为 {acc zero_shot_generate-chat}，"
        "与对同一提示词打分几乎一样：{diff zero_shot_generate-chat zero_shot-chat}；"
        "但对这个提示词打分，不如对普通提示词打分：{diff zero_shot-chat zero_shot}。"
        "没有验证的是：起作用的是对话格式还是问句；换成随机采样会怎样（这里用的是贪心解码）。",
    ),
)
