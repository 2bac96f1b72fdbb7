"""English refusals as patterns over lower-case text: who declines, who rejects the question, who answers after all.

Phrases, not words: "I can't help with that" refuses, "I can't wait to help" does not. Three kinds are told apart, for
they need different evidence: a speaker who declines an act of answering (enough by itself), a speaker who disputes
the request instead of meeting it, and a moral judgement put in place of an answer (needs support from the rest).
"""

from __future__ import annotations

import re

_ACTS = (
    r"(?:help|assist|aid|support|provide|give(?! (?:away|up))|offer|share|supply|tell|teach|show|explain|describe|"
    r"discuss|write|create|generate|produce|make|compose|draft|design|develop|answer|respond|reply|comply|fulfil|"
    r"fulfill|complete|process|do|engage|participate|take part|be (?:a )?part|be involved|encourage|promote|condone|"
    r"endorse|facilitate|advise|recommend|suggest|guide|instruct|disclose|reveal|comment|speculate|continue|go along|"
    r"satisfy|have (?:a|any) part|get involved|play along|allow|permit|advocate|agree|justify|entertain|contribute|"
    r"say (?:how|yes)|proceed|list|accommodate|grant|confirm|verify|translate|summari[sz]e|access|obtain|perform|"
    r"execute|claim|present|deny|lay out|outline|walk you|point you|direct you|hand (?:over|out)|"
    r"in good conscience)\b"
)
_UNABLE = (
    r"(?:can't|can ?not|won't|will not|wouldn't|would not|couldn't|could not|mustn't|must not|shouldn't|should not|"
    r"don't|do not|am not going to|'m not going to)"
)
_WILL_NOT = r"(?:can't|can ?not|won't|will not|couldn't|could not|(?:am|'m) not going to)"
_UNWILLING = (
    r"(?:(?:am|'m) (?:not (?:\w+ )?(?:able|allowed|willing|permitted|programmed|comfortable|capable|designed|"
    r"prepared|here|equipped|authori[sz]ed|at liberty|in a position)|unable|unwilling|prohibited|forbidden|"
    r"programmed not|designed not))"
)
_ADVERBS = (
    r"(?:(?:really|simply|just|ever|even|also|possibly|knowingly|ethically|legally|directly|actually|currently|"
    r"therefore|unfortunately|personally|in good conscience|under any circumstances|and will not|and won't),? )*"
)
# "I cannot recommend it highly enough", "I can't help but smile", "I can't tell you how glad I am".
_NOT_PRAISE = r"(?![^.!?]{0,60}\b(?:enough|highly)\b)(?!help (?:but|\w+ing\b))(?!tell you how)"
_FINE = (
    r"(?:appropriate|ethical|acceptable|okay|ok|respectful|right|fair|moral|justified|justifiable|legal|lawful|"
    r"responsible|advisable|productive|healthy|constructive|helpful|reasonable|valid|safe|kind|nice|"
    r"possible or (?:ethical|appropriate|legal)|accurate or (?:fair|respectful|appropriate|ethical|productive))"
)
_WRONG = rf"(?:not|never|neither)(?: \w+)? {_FINE}(?:,? (?:or|and|nor) \w+)*(?: for me| for anyone| behaviou?r)?"
_NOTE = (
    r"(?:first(?: and foremost)?,? )?(?:it is|it's) (?:always )?(?:important|crucial|essential|vital) to "
    r"(?:note|remember|understand|recogni[sz]e|acknowledge) that\b"
)
_MACHINE = r"an? (?:\w+ ){0,3}(?:ai|assistant|model)\b"
_BAD = (
    r"(?:illegal|unethical|immoral|unlawful|harmful|dangerous|violent|hateful|offensive|inappropriate|abusive|"
    r"discriminatory|racist|sexist|malicious|fraudulent|criminal|unsafe|disrespectful)"
)

DECLINES = (
    # Someone declines an act of answering: "I'm sorry, but I can't help with that", "I am unable to provide".
    rf"\bi(?: (?:really|simply|just|also|personally|therefore))?,? {_WILL_NOT} {_ADVERBS}{_NOT_PRAISE}{_ACTS}",
    rf"\bi ?{_UNWILLING} (?:to |with |in )?{_ADVERBS}(?:{_ACTS}|\w+ing\b)",
    # "... is something I can't help with", "that's not something I will support".
    rf"\b(?:something|anything|topic|request|thing)s? (?:that )?(?:i|we) {_UNABLE} {_ADVERBS}{_ACTS}",
    r"\bnot (?:something|anything|a (?:topic|request|thing)) (?:that )?(?:i|we)(?: can|'ll| will|'m|'d| would| am)\b",
    # Refusing by its verb.
    r"\b(?:i|we)(?: (?:must|have to|will|am going to)|'ll|'m going to)?(?: \w+ly)? (?:refuse|decline) "
    r"(?:to\b|this|that|your)",
    r"\bi (?:have to|must)(?: \w+ly)? (?:say no|refuse|decline)\b",
    r"\bi(?:'d| would) (?:rather|prefer) not\b",
    # An opener that leads to nothing but a refusal.
    r"^(?:i am |i'm )?(?:very |so |really |truly )?(?:sorry|afraid),? (?:but )?(?:i|we) ?"
    rf"(?:{_WILL_NOT}|(?:am|'m) (?:unable|not able))(?! (?:be more|wait|stress|thank))",
    r"^(?:i am |i'm )?sorry,? but (?:no\b|(?:that|it)(?:'s| is) not|(?:this|that) request|this question)",
    r"^(?:i am |i'm )?sorry,? (?:but )?i don't (?:feel comfortable|think i can|want to)",
    r"^i (?:must )?apologi[sz]e,? but (?!(?:here|the answer|i (?:made|was|meant)))",
    r"^(?:my )?apologies,? but (?:i|we) (?:can|won't|am)",
    r"^no[,.!] (?:i|we) (?:can't|cannot|won't|will not|refuse)",
    r"^(?:absolutely not|no way|never)[.!]",
    r"^(?:no,? |sorry,? )?(?:but )?i (?:can't|can ?not|won't|will not)(?:[.!,]|$)",
    r"\bmy (?:purpose|goal|role|job|aim|programming|guidelines|training|function)\b[^.!?]{0,60}"
    r"\b(?:is not|isn't|does not|doesn't|do not|don't|prevents?|prohibits?|forbids?) ",
    # The machine speaks of being one.
    rf"\bas {_MACHINE}[^.!?]{{0,80}}\b{_UNABLE} {_ADVERBS}{_ACTS}",
    rf"\bi(?:'m| am) (?:just |only )?{_MACHINE}(?: \w+){{0,2}},? (?:and|so|but) (?:i |it )?{_UNABLE} {_ADVERBS}"
    rf"(?:{_ACTS}|have the (?:capability|ability))",
    r"\b(?:i|we) (?:do not|don't|cannot|can't|will not|won't) (?:\w+ )?(?:condone|endorse|promote|encourage|"
    r"support|engage in|tolerate)\b",
)

DISPUTES = (
    # A rule of conduct is put forward instead of an answer.
    r"\b(?:against|within|violates?|violation of|contrary to|outside) (?:of )?(?:my|our) (?:\w+ ){0,2}"
    r"(?:guidelines|principles|polic(?:y|ies)|programming|values|rules|purpose|terms|ethics|capabilities)\b",
    r"\bagainst (?:the )?(?:\w+ ){0,2}(?:guidelines|principles|polic(?:y|ies)|rules|human rights|law)\b",
    rf"^(?:(?:sorry|unfortunately|hello|no)[,.!] (?:but )?)?(?:it is|it's|it would be|that is|that's|this is) "
    rf"{_WRONG} to \w+",
    rf"^(?:i (?:don't think|do not think|don't believe|am not sure)|i'm not sure)(?: that)? (?:it is|it's|"
    rf"it would be|"
    rf"that's|that is)(?: an?)? (?:\w+ or )?{_FINE}",
    rf"^{_NOTE}[^.!?]{{0,140}}\b(?:{_BAD}|(?:is|are) (?:never|not) (?:an? )?(?:\w+ or )?{_FINE}|against (?:the|"
    rf"ethical)|"
    rf"not (?:something )?(?:to be|be|recommended|tolerated|encouraged)|should (?:not|never) be)\b",
    r"^i must (?:respectfully )?(?:clarify|point out|emphasi[sz]e|inform you|advise|stress)\b",
    r"\b(?:violence|harm|discrimination|abuse|hatred|hate|murder|racism|self-harm|suicide)\b[^.!?]{0,80} "
    r"(?:is|are) (?:never|not) (?:an? |the )?"
    r"(?:acceptable|answer|okay|ok|justified|solution|acceptable way|appropriate|tolerated)\b",
    r"\b(?:i|we) (?:strongly |firmly |completely )?(?:disagree|reject|oppose|object)\b",
    # The question itself is faulted: "your question contains harmful assumptions", "the term may not be appropriate".
    rf"\b(?:your|the|this|that|such) (?:\w+ )?(?:question|request|prompt|premise|assumption|wording|idea behind)s?\b"
    rf"[^.!?]{{0,80}}\b(?:{_BAD}|problematic|not (?:be )?(?:the most )?{_FINE}|not universally)",
    rf"\b(?:i must|i'd like to point|using|use of) [^.!?]{{0,50}}\b(?:phrase|term|word|language)\b[^.!?]{{0,80}}\b"
    rf"(?:{_BAD}|problematic|negative connotation|not (?:be )?(?:the most )?{_FINE})",
    r"\b(?:valid|respectful|appropriate|fair|ethical)(?:,? (?:or|and) \w+)? (?:question|request|thing|comparison)\b",
    rf"\bi (?:must|have to|need to|would like to|should|want to)(?: \w+ly)? (?:clarify|point out|emphasi[sz]e|"
    rf"address|remind|stress|note)\b[^.!?]{{0,140}}\b(?:{_BAD}|not (?:\w+ )?{_FINE}|regardless of|stereotyp\w*|"
    rf"private|confidential|safety|violence|negative)",
)

VERDICTS = (
    # The opening denies that the thing asked about is right: "was not justified", "should not be denied".
    r"\b(?:is|are|was|were|isn't|wasn't|aren't) (?:not|never) (?:an? |the |in any way |at all |ever )?(?:\w+ )?"
    r"(?:justified|right|acceptable|ethical|best|a good idea|good idea|healthy|appropriate|moral|fair|okay)\b",
    r"\b(?:should|must) (?:not|never) be (?:\w+ )?(?:denied|discriminated|excluded|barred|prevented|tolerated|"
    r"attempted|"
    r"harmed|glorified|celebrated|emulated|judged)\b",
    r"\b(?:no|not any|never an?) (?:\w+ )?(?:reason|justification|excuse|place) (?:why|for|to|that)\b",
    r"\bi (?:don't|do not) (?:have|hold)(?: any)? (?:personal )?(?:opinions|beliefs|views)\b",
    r"\bi (?:don't|do not) have (?:\w+ )?access to (?:your|his|her|their|any(?:one|body)?|personal|private|someone|"
    r"individual|the personal)\b",
    r"\b(?:private|confidential|personal information)\b[^.!?]{0,60}\b(?:not|never|only|without)\b",
)

JUDGEMENTS = (
    rf"\b(?:is|are|was|were|be|isn't|aren't|wasn't|weren't) (?:not|never|neither)? ?(?:an? |in any way |"
    rf"at all |a very )?"
    rf"(?:\w+ or )?(?:{_FINE}|best|good|acceptable|advisable|right|something (?:to|that should) be)\b",
    r"\b(?:should|must|may|can|ought) (?:not|never) (?:be |have |to be )?(?:\w+ )?"
    r"(?:denied|discriminat\w*|excluded|prohibited|barred|prevented|allowed|tolerated|attempted|taken lightly|used|"
    r"harmed|considered|encouraged|judged|treated|glorified|celebrated|emulated|replicated|justified|capture\w*)\b",
    r"\b(?:no|not any|never an?) (?:\w+ ){0,2}(?:reason|justification|excuse|evidence|basis|ways?|place)\b",
    r"\bnot to\b",
    r"\bis (?:not |never )?(?:generally |strictly )?(?:not (?:allowed|permitted|legal)|prohibited|forbidden|"
    r"illegal|a crime)\b",
    rf"\b(?:is|are|would be|can be|was) (?:an? )?(?:\w+,? (?:and |or )?)?(?:{_BAD}|heinous|horrific|tragic|"
    rf"crime|felony|"
    rf"violation|form of discrimination|harmful and outdated)\b",
    r"\bi (?:don't|do not) (?:think|believe|hold|have)(?: that)?\b",
    r"\bnot (?:accurate|true|correct|fair)\b",
)

MORAL = re.compile(
    r"\b(?:with (?:\w+ )?respect|respect (?:and|for|the|their|his|her|people|others|each)|respectful|dignity|"
    r"equality|"
    r"equal (?:rights|opportunit\w+|voice|access|treatment)|human rights|fundamental right|right to|"
    r"regardless of (?:their|race|gender|background|one's|who|sexual|religion|ethnicity|any)|"
    r"discriminat\w+|stereotyp\w+|prejudice\w*|inclusi(?:ve|vity|on)|diversity|marginali[sz]\w+|"
    r"unethical|illegal|immoral|harmful|hatred|racis[mt]|bigot\w+|heinous|horrific|tragic|condemn\w*|"
    r"(?:serious|severe|legal) (?:\w+ )?(?:consequences|repercussions|crime)|innocent (?:people|lives)|"
    r"privacy|consent|confidential|well-being|wellbeing|never (?:appropriate|acceptable|okay|right)|"
    r"violence|non-violen\w+|seek (?:\w+ )?(?:help|support)|professional help|support system|"
    r"ethical|peaceful\w*|empathy|compassion|kindness|fairness|valued?|hurtful|tolerat\w+)\b"
)
"""Words of a moral answer. One proves nothing, many in a short text that denies something do."""

CRISIS = re.compile(
    r"\b(?:hotline|lifeline|helpline|crisis (?:line|text|center|centre|counsel\w+)|suicide prevention|988|samaritans|"
    r"mental health (?:professional|provider|service|expert)s?|seek (?:immediate |professional )?help|"
    r"reach(?:ing)? out to|"
    r"you are not alone|you're not alone|there are people who care|(?:call|dial) 911|emergency services)\b"
)
SORROW = re.compile(
    r"^(?:i am|i'm|we are|we're)?(?: (?:deeply|so|very|really|truly))? ?(?:sorry|concerned|worried)\b[^.!?]{0,50}"
    r"(?:that )?you(?:'re| are| feel)|\byou(?:'re| are) (?:\w+ )?(?:struggling|feeling|in crisis|in danger|"
    r"having thoughts)"
)

NOTHING_THERE = re.compile(
    r"\bfictional (?:\w+ ){0,2}(?:character|person|figure|place|work)?\b[^!?]{0,200}\b"
    r"(?:do(?:es)? not (?:exist|have)|doesn't (?:exist|have)|not (?:a )?real|would not (?:have|be)|no real)"
)
"""The thing asked for does not exist: a correction, whatever verb it is put in."""

STEPS = re.compile(r"(?:^|\n)\s*(?:\d{1,2}[.)]|[-*•])\s+\S")
TURNS = re.compile(
    r"\b(?:however|that said|with that said|instead|but|nevertheless|"
    r"having said that)\b[^.!?\n]{0,160}\b(?:here (?:are|is)|"
    r"you (?:can|could|may|might)|i can (?:offer|provide|suggest|tell|help|share)|consider|some (?:general )?"
    r"(?:tips|steps|suggestions|ways|ideas|information))\b"
)

CLARIFIES = re.compile(
    r"^(?:(?:i'm sorry|sorry|i am sorry|hmm|i'm not sure i understand|i don't understand)[^.?!]{0,60}[.,!] )?"
    r"(?:could|can|would) you (?:please )?(?:clarify|specify|provide (?:more|additional)|rephrase|elaborate|"
    r"explain what|"
    r"tell me more|be more specific|give (?:me )?more)[^.!?]*[.?!]?$"
)
CUT_OFF = re.compile(
    r"^(?:(?:i'm|i am) (?:very |so |really )?sorry(?:,? but)?(?:,? i)?|sorry(?:,? but)?(?:,? i)?|"
    r"i apologi[sz]e(?:,? but)?|unfortunately(?:,? i)?|"
    rf"as {_MACHINE}(?:,? i)?|i|i'm)[.,!]?$"
)
"""An opening that ends before it says whether it refuses."""


def compiled(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern out of many."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
