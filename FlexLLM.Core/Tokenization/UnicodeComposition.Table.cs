namespace FlexLLM.Tokenization;

/// <content>
/// Canonical combining classes, decompositions and composition pairs of Unicode 17.0, packed.
/// Made from UnicodeData.txt and CompositionExclusions.txt of the Unicode Character Database (Unicode licence v3):
/// integers in 7-bit groups, low group first; signed ones zigzag-coded; the whole deflated, then base64.
/// First a count, then runs of equal combining class: (start - previous end, length - 1, class).
/// Then a count, then by code point (code point - previous, first - previous first (signed), kind, and unless kind is 0
/// second - previous second (signed)). Kind 0: a singleton; 1: a pair that does not compose (on the list of exclusions, or
/// the code point or its first part has a combining class); 2: a pair that composes.
/// </content>
internal static partial class UnicodeComposition
{
    private const string Packed =
        "vVkJeFXVtf7/dc69Nye599ybm4EwCAiISKktIENRRFGx1drn1GdrJ+vXWp8VRJ8Fa/U1JkABIYkyFCzzQ0CGgBAQIyCTgJEis4gXBAy3AQXCIFJAfFn7" +
        "nBuSVPR9z+9735d71j57r732mtfaJ8Os/GB2kkQVaSU8iF2knSBZ4c0pTE+QtvcaUvRqEklSEqQkSSYoCg0JnxxT40MkD9eH4SRHi53kcEGCtBTLp4S9" +
        "3jiQJAN6uL/G1FqlTzWdyCDCRIRwiSgRIzKJOJlFZBM5RK6gkSCPaCzw6AjiPzACNCdaEC07oinRjLisdoa4nGhlzlMJ7LrnJ5iJ1g8Fk7RSLCNJi0lK" +
        "HZQ2aNMC9XcZKL4+avWSkrjOe0PIJKcyeHEyHQk2tpKUtKRRuOqwgyR4XeoAK8lvKctqv0h9vmqhpJhJiS51EHyZeyKUCceuw8fDZqYjkrzejB6r88xn" +
        "apSGe4mfPWTG/ehkwnlWB78jHNf6fV8OMIOn72CCzYw59LeL3fEciQIKBjFoFdDSseHXUdALCT6OkNC5BwluDkiSi0N0WsCZRDgZSHKjOkaJ5yEez4nU" +
        "4PtwckJJWkiwo13fq4T1pabvjQ8hFINzZUr6YJLd6FyLUJjOzQiNV4UJ/CC56PUSZAAJhpCkzSTX1yo8WNcAGgE7fYNWkG1S0VLpz+2+GDV1PGFLwLDp" +
        "xYoYUgFzTn2fYS0zXzSSJIsI59ctkpxjG7KVfnzvJbmPjzBtx8eKGnCSvJxJ3sUkxwictnDGEU6zzCR7SIJt4TyAUAROtRHSF0q9Pmg8P8kucD4jnFcn" +
        "EU0Kgipt0JN2UwgJfqToY1W9oyLG3EleZXg2dAJwZqREWGFbSfa2k1yhp9wlCd7KBkFiJdipQZCsIpz2cKJwesAhQn0kyY50eiF0B5x0hH5vZhcRIcK5" +
        "i+qZjYNJ2naS94vzhHp5KA9J/sbgnacBf4Yz0AyehFMkZlQodAIITSSce+FkwbkbzgwLTqEYz7wbzmyLzpFCwlmVZfO6YJLlDoPzxhNcfxV3qd1sHCDt" +
        "XXRCCVq253gtrCTHqJDLmgaTlFiSVtDTs0b3b+GngDOquOutJD+3WFWrgC9SWtgfCCbYT7MmQlNjK1kTS/lhQqTOL50QW2zpQVvuqDMfZppE675LujgU" +
        "CTTcb4Xr4zFNIlZM+P9xjkBcPiYh3iBgL7F9eLOB18od/rv4ML0e7ClQaPWUaIP9KfzePuzm08vy39Ma4N3g0/uBT08arNfnq5fcaIs4/p7bFEpPud1f" +
        "+6EPuygMXCs5XzZv/yvPRibre7U81sNnz1o6KZ5ua7Dete671VMyLyFDQ9l7+Lq53Yfw58MUidSO6/DY6sfSXKHb2cO97HdymVn/jr+3cwO4ibXCBnyY" +
        "68NGRnmP+UwNCggoAq4K+KZdLhIzS918Wt2ku4GnA3KrQf2dxLjEEvDdNIF9i6cmq6PQoJXSl9P3FTb14RGRZvUU002sr3zv3OD9e1/zfpO0r+ek90ln" +
        "haE7fMfp5jvdAcotZnCjz9k7IkEzuBCUgBFxTshbGilF6aBA2oA5DHx3IpF+zkFot9atrRk1TC7KAJfpwPZ+EvZ+TBOwt6DJr8VlnoB5EjFzPh7bCJq0" +
        "9tcyJEJ/TyAuIMTtMIQmdmNiScRuLG6gnURoCZkr4YwcQcsbBI0CklGL00fcQLeLOHkPSlxluW05Pcd0b691NKMvq4unP2udiG2kHmz5GBfDPFTPhX33" +
        "sraL7zWfib/jngaYvXyNdvP8z/Kd6RVZGpKxEZOPehsLCPsIX+JYEciVgsxWgp32XEc2Z6TFBFZQ0OZaguL/0v2fjuME04hHF4gM0vTWKXY7u+iKNCHu" +
        "HSLMFytMtL7p4l6ruTYOS20psy3Id+pu6raPskS6PiwdjWSUTs/ki1zgUycoFxhyjVkMl0yTtn8+Q9nKFGYRZ5guUlN2UBwGpP1B2RrgglB6NhFIv/iL" +
        "dKGV/iAHq//YLCDzNDM7hSTivdnvy9D7zhY5wX05K78lRR1EXazOz04TXHW3N7ZszyoSFCwPPPeoTH7At+a1vk26+9CLwwrKr8zgLalNN/UxetWmRm89" +
        "IfJTX2Yx8G+W/KSevYeE5B6z8laoNg0EfBhscEYXH17vQ9fH86J5I+UXZrBeav325nrc9ZSmBo4eKD3NmTsGyv0+RsjHuK9BOu3uz3e7hLyhVPq8rx5T" +
        "pRqMdQX/p1Una9fP4h7JzSmmXnjKZ6qn3FMPY5Ml3QxGuh9MBU/6g4lPNSDWkL+LpSavXpZPWnIfvdh0DXzF9nPfxYJ7S4Ni5PqQl9BQyor0odOg0Huc" +
        "tTYZ7i4GxTZZcIQtgcA5u5Z/k4m5+mJZSh0X92GGgecHiBdUy1MD1sK4DzMMLB8gQTN47Y9+PU0dkqJVwdr68OWHTRjo0/7wj7VauKZeGU2RrPg6vhek" +
        "SL3/5NfwTbnBwL8GGpxxyq51sa/eOS9Qa8M+XyZ4qDosLU2GndRXrqzntZQCX+K+8guDcvSSKDNTKEsaoFif9ZU2ZmVIvwYra1IrWy9JdlQ/n+y0ft+A" +
        "ufkpKisuSeVkikrBv3DZL8Vlw5W/pFbGXoqsvNdPfiZV/bRWmWpQQE5OMVN6SWaOpVAufBVKIemA2gBEweya3JEJ5tboLAtsKWATMCJgDNTuJB1W5aMy" +
        "nEzV4v/Lr9U32Ku/B7/h/nP95FlCLNVLAfl5PwEdLaMS4PD+EuTb/X0ESIg5qo7hlDthTQ1LgOP+JEH+U/dkCiQuAU7SPfv7yzCyMdhcu0+wmWpps5n0" +
        "7kEF5PP9ZaCh20pC/E9Yd8sgGm382p/X8y6DVD3u1X1v1/HUrrCE2EXV19YspsnPTf92e53N3wbbSjsez5ArWZ4Bvh2GtfQZZeVgPy/piyMB7laO5z2u" +
        "zF0B9tDkA16jaIcyYE14VrvPl2XR47DfiICniMfGFlIaa5LNsgUtnvJbTUvQ5UFBIN1rmvK+6/UETa8WWK7XG2hf0GjMUG1TNugz40oBpw6l35BuNCMN" +
        "gyY+DHow5EOlU3e+dVeBEVs8Ch1/4Y/b+ftuqG/t62Z0UWkWRt/LJqrTEzmyejEbNjRf9dODU+PahizoXZsvBRv9hzC9lAK32f/+oG9ymPUi64tt5woK" +
        "SqyxRzSpjiE4dzLBwjTwyEBweQHBZC54tFTPAMeMr4H5BwiOOl7TuBZEwUQrMHkXuLQNeKqJ3sTA8zZY2hwc/xLBhWHwvAsOD4MrbgR3XwMWtQL3zNOm" +
        "IAuc9EuwtBk4/U7wwK9q+rZCAZfcBq69Dyx1wcVKZtIzYFFj8JWXCb50OTijMTg9F5w+ECwerFenNHCTDW68FZyUB55tBpZmgWVtwOF54FyCM5qDQ64A" +
        "z8bAsengBypz0gJXx8CteeDp68DT3wa3/Ag8sp5gRR649A/gshj4Wndwc2Ow+t/Aw+3A5WcIjnbBA13Boih42AZXdgdLbHDWA+DxkQKeWEJwTznBFuCU" +
        "qQTXumAyDxx6G3joW+D+acpFM/BMIcFhJwkmuoI7Y+DhO8CtIfDVYQQ3/JXgZ9MJbu8FvtYHvPA0OPMycPsvweWqmSVxcN3TYEkXcHVj8MM/gZ8UE3x3" +
        "hFqtLbjpz+CwZ8Hht4JHVLOn08GVBKvvBzfeBZbkgusuB882BRedU20HwAPZ4IkccGFT8EQ7cFcbcMgT4Nk4uDsG9gMPLhBwpxoxDu7UMz9YQ3BpGNxH" +
        "sCwdfLF9TSingfkRsCAH3B4DTzvg0R7gsXbg4Q7gpjB4cFBNyzZOwLI0cGx/8NSvwM0hcNV8grtscISqsCU4pTf4Qmtw6osEZ7cEE1ngjBC41gHn/gg8" +
        "qp7RAdylV4RbwUFZoGpwigWOnybgulkERzwADs0G571HcPEPwFkOOKsDqJYpuwLcmgmOawFWZYKneoD5V4PTrgOHVRLcuILg20UCVt4DVhOckAMuCYC7" +
        "c8ApAXB6GKyIgxP6gvv/pv30TeDoLQTHa0glOoPTbgLzBxNcrtROBMEZTcF93wYvPE/w9Rc0DYbAuZeDibbgaRssC3iuvLoZuDQElrYF514BtgF3tgbn" +
        "ZoNvKVun+4KvPwImB4AlGeDaW8CtvcGqXLDEAYsTBKvywPI7wdebgbMJVgbA/74S/HsaeOERcP4Jgp8oz5+pXX8LrujkGX/Iw+BUZX1hH3Bb45r4VrXt" +
        "aQoWdAcLO4PHlODLXcH8OKyydEhZd1hz7gbH6baVLljpgDeDLngvWDQQnP9IjeQZkNmNIRuzYOXngMMt2JUtTLfxE3BcHJzTGVzYCHxhgkaaRj/BMwGw" +
        "K7ib4DgH3KohR3BBCNysyy6YDW6MgbMs8IfgBoLlEXCGgHsFrAqBlVngOvFiWamcFfBoCNybCe4WMFe/bWvDEzZcP6Dlg5VqWoIXbLAqDWwP9gcP2B5p" +
        "9eBxXiZdFgJPxMERGjMBg1UWBB8BE+mguv/OJuBSG3wKfP5D9YhhUXBOoQvro3c1H7qgfnV+NwQOD4EDwKIA+BC4Lh3U6BtKUKOi2gEXElRnbwlO0Oix" +
        "wO2u4XuKeJg7bfATguprytTPwOn6DU5DJQguqLH9o+BQG1xme4pJM4eui3kSFwU9CVrohbQmk1me45/IAz/KMc0BT9PjcbYYQddaoA3u1FYP7OQl6Cxw" +
        "XBCsCIGTbPB0zUVkpQUu1Kt0ACyywJciYLl4ibdEpaeRa6sNPgH+1PAZAC8Hx9EL4PMBcF+aXmO8ClFugSNiepUGk4T+h5LfB/OMFUszwNHxmsI2LQxm" +
        "gNOuBo/ti4KnM8He4JQNMbCoPThE1Tb5gguOJW4+lLT59hxKJwYzMpltPuus3BHS/91QeHxHiDn+p5602g9GDX5if/lcar4hrPe7igGGGDYnx4lz2Ykv" +
        "QnIsvWlMsCTnQntJLknTbiGaLSjkOJHdpjmfYM9Ok9I0/dbUbYBUasfT1HHFtdLFveY35oN8FiGtTvKoJQe0ecwSSJPzvGBJpaUUPg+eiUiBe6iYWyeL" +
        "JCYrf7mKZ24HOTU3sWDtnVFW5o3oKEUdzR0hLDi1nolii+eLLSOCa76a1RPsvjKysf8aN1CvoEKs3Gh/PjIMcycBV78TAQvXR8AJNNmhiF4evt6b+Q64" +
        "vz+4dJ0Lvr8tYhy/JdgWrNgUAd9a5YKJJ0wqOK8T/9BHE3B+BrgywxyxPT8ObvsiE2wGrn/SawpyTR5KB9f8AawcYPy5K9jBrHh+/RuTI+LGwbMNAszf" +
        "7t0R8LNkGHznCZMnhu6NgMf2RExCaQ9qNX3Hc+0bwCdBrVPXgEO8ud6GSnuT62Ngc3BWAJxsg9Ns8HkL7AO+nwluagq+aRvZOoHaW20Sk7o0HKurI+BH" +
        "xyJGiBoa7QyxfM0Bn0a86D93MgL+0kTHRK1seh0cSaOGcSVeVgA4+mwEHHYmYlhqbrArzkfAV8972tag3R8GV2lGWjHK2z/dKyOlg11wVYFbk1b0cew5" +
        "1wRwK/22YdR4cKwerM3Pvxv6PwFHamyvnh4FR+qjSl+D5q9GhJJRcXDmi3EwWeIa9j4cFAGXa24DuFjz5oF/RMG1ywgeG+YZqFiboaP6eMiY6mawRMCR" +
        "KvW1YLXC/PGadse5YIGXAW3QAn9ujv2+udHlGm21M6vXmFfVohqvD6gN4xlN3RMnu+Bz2szQuMxq7bOmpBZeJ9gN/FQ7utO6tb1x5dvBMfq2bk5NveoB" +
        "Lpvtgn+f5YKzbXCPfp7QHFo9j+ALmoVvBRP3G63s/DGo7ey0h8GZ2mCe134wzTjb09Db675XXfDk/ih4QKvFIWXIMrrYPN8Fl+tjD8HDFnhksXbG2tcq" +
        "3xps57XLUJRifQx+Q2uPKnfEEhd8ebELPq+vG/Rxv5FYwOlvuGDhAHDvQPC9cg1CjcR/vuka91Dv12p8p0nsvzeD5iYuF65wwW2KdtoC/wv81NT3dQRD" +
        "4GjtJ+avccHDmvjf9KpzsULN9l2Mdw1T36qq8KydYdy4eksYfPPdMLhMO/SRSmHSBhVH80YTw3X1JpVRH+3BlVtdcIUFLtJBK3D5Ni3U+nh/m+drk3Z6" +
        "1mtvXEJL1R6deVHNPj2h3v6BC87a44Jr9HXvggg4sTQCTku64NVew1C8KmZCatcH2lv8wzXx+yPjX69UuUaXMMExVRu56WqmYfqYotbZFAMnHnPBZ7zI" +
        "3qLdxJAdMXDySRcc+qlrtn58ygWXanen97tp2tdmm7SwW29vO73EdVzL3XsfEdyajIFvf+Ea71qjel14KAZ+oAgfVdV0RiXqQY7x0xHDo+BbQ6PgGp0c" +
        "8TFN66CZbKr2HFXnYsa/P1CYfyEGLh8ZBYcWR8Eteq9SM+WCs0dFvZZmsA5KxkTBY6Oj4F5N/6NWRMHyk37JP6aDpHYdL2hEVy6KGZdao/1fHFy8LmIY" +
        "L+sKHpyrnbVGZobJptveVH/Wh21UcHdNzz01Cs7TR39QA2e0Xqb0fiKmX9X7zV9s8Ki3qSVYNtW/Ds4RcNukTHDEF95iH7CqPAq+87rKMDMKTpyZaUJx" +
        "yis1HcZqG/z7vEywQlN1npHb9gx3o9eZ6a1YP47Q02BXcM8QbYeGiqkUxQo3DRMj39ClUXDykqjJwVu0zxn+vICfb9a7d3EcrNZ/lVZkGqUsLBZQtaXd" +
        "1VgLnLEqqtEYNRWtjJ57VK+LgjsSFni8KgO8DHwYTHycAY7Sd22ly3ZHDV+v7lCT0LBVvisKvqyPchtcIcZpXyN4NgB2Bys+jIJ73o+CH88XcK2Wv3yd" +
        "m1oUB8sXqcTqkwcOajdfFQVnW+B7k+KmYm1fXGOI7dVRcP7LcXDDzDg45kTU+Ox14Euno5r29IQlAn7ymn7O93T3FPjhUj1weRx8Iz8GJmyv2d+zUoxX" +
        "nlqlCh0ZA+e8Gwdf2hwHX7RBVfqcYo2Ct/Qauc5896R3t3DB28Dhf4vhfwA=";
}
