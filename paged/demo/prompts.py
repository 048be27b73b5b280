"""The built-in prompts of `paged demo`: 32 beginnings, from one word to a long speech, in the tiny model's style."""

PROMPTS = (
    "To be, or not to be",
    "ROMEO:",
    "KING:\nWho comes here so late, and with so pale a face?",
    "My lord,",
    "FIRST CITIZEN:\nThe corn is gone, the granaries are locked, and still they bid us wait. How long must "
    "hungry men be patient, sir? My children cry for bread, and I have none to give them but my word.\n\n"
    "SECOND CITIZEN:\n",
    "What news from the north?",
    "QUEEN:\nI dreamt last night of water, and of ships that had no sails; they went before the wind as if "
    "some hand had drawn them to the shore. And when they came to land I saw my son stand in the foremost "
    "one, and he was old.\n\nLADY:\n",
    "Speak, I charge thee",
    "The moon",
    "JULIET:\nGood night! and let the morning find thee kind.\n\nROMEO:\n",
    "Gentle friends, the hour is come that we have feared so long. The duke is dead; his brother takes the "
    "crown; and all that loved the old man in his life must either bend the knee or cross the sea. I am "
    "for France. Who will go with me there? I have two ships, some silver, and a cause. It is not much, "
    "but kings have won with less.\n\nLORD:\n",
    "Hark!",
    "DUKE:\nBring in the prisoner.",
    "O thou",
    "NURSE:\nShe was the sweetest babe that ever smiled, and never cried but when the bells did ring.\n\n",
    "CAPTAIN:\nThe bridge is down, my lord; the river swells with three days' rain, and all the lower "
    "fields are under water. If we wait for dawn the enemy will hold the farther bank. If we should try to "
    "ford it in the dark, I fear to lose a third part of our horse.\n\nGENERAL:\n",
    "Come hither, boy.",
    "If music",
    "SERVANT:\nThere is a man below that will not leave. He says he has a letter for your hand, and yours alone.\n\n",
    "Farewell",
    "BISHOP:\nMy son, the oath thou swor'st was sworn to heaven, and heaven keeps a longer book than "
    "kings. Unsay it if thou wilt; but know that words, once given to that ear, are never lost.\n\n",
    "Why, then",
    "I have seen a garden in the south where every tree was older than the town, and in the midst of it a "
    "well so deep that he who dropped a stone and turned away might dine, and sleep, and come again at "
    "noon, and hear it fall. So deep, my lord, is grief; so long it is before we hear the stone.\n\nDUKE:\n",
    "Who's there?",
    "MESSENGER:\nThe town is ours!",
    "HENRY:\nOnce more I bid you, put away your swords.\n\nYORK:\n",
    "Death",
    "CLOWN:\nA fool may ask more questions in an hour than seven wise men answer in a year; and yet the "
    "wise men are better paid for silence than the fool is for his tongue. Is this not strange?\n\n",
    "Now is the",
    "MOTHER:\nTake thou this ring; it was thy father's once.",
    "We are such stuff",
    "LORD:\nThe king is in the chapel with his priest, and no man may disturb him till the bell. I have "
    "been standing here since break of day with half the petitions of the shire, and every hour there come "
    "a dozen more: a widow and her land, a stolen cow, a bridge that no one built and no one owns, two "
    "brothers and one will. It is a trade, this ruling, like another.\n\nGENTLEMAN:\n",
)
